"""Symmetric memory: buffers that the ranks of a group reach on one another's GPUs by peer access.
The copy engines fill them; no multiprocessor takes part.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from tp_trainer.parallel.mesh import Axis

logger = logging.getLogger(__name__)


class SharedBuffer:
    """A buffer of the same size on every rank of a group, until `close_all`. To make one is a
    collective.

    Args:
        numel, like: its size, and whose dtype and device it has.
        group: a process group's name.
    """

    def __init__(self, numel: int, like: torch.Tensor, group: str) -> None:
        self.buffer = symmetric.empty(numel, dtype=like.dtype, device=like.device)
        # torch writes what the ranks signal by, and the table of everyone's addresses, on the
        # device's default stream, which ours don't wait for, the table to where queued work may
        # still write (its newest sources no longer do)
        torch.cuda.synchronize()
        self.handle = symmetric.rendezvous(self.buffer, group)  # type: ignore[arg-type]  # a name
        torch.cuda.synchronize()
        self.rank, self.size = self.handle.rank, self.handle.world_size
        _open.add(self)

    def close(self) -> None:
        del self.buffer, self.handle

    def barrier(self) -> None:
        """All ranks' streams wait here for one another."""
        self.handle.barrier(channel=0)

    def of(self, rank: int, shape: Sequence[int], offset: int) -> torch.Tensor:
        """A part of a rank's buffer, from element `offset` on."""
        return self.handle.get_buffer(rank, tuple(shape), self.buffer.dtype, offset)


_open: weakref.WeakSet[SharedBuffer] = weakref.WeakSet()


def close_all() -> None:
    """Give up what ranks share, before their groups end: collected later, in the capture of another
    CUDA graph, it ends the process.
    """
    if _open and torch.cuda.is_available():
        torch.cuda.synchronize()
    while _open:
        _open.pop().close()


def possible(axis: Axis, device: torch.device) -> bool:
    """Whether the ranks' GPUs reach one another's memory; a collective."""
    group = axis.group
    if device.type != "cuda" or group is None:
        return False
    where: list[tuple[str, int]] = [("", 0)] * dist.get_world_size(group)
    dist.all_gather_object(where, (_boot_id(), device.index), group=group)
    others = {index for _, index in where} - {device.index}
    # ranks on one GPU, as torch asks for it
    sharing = os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"
    own = (
        len({host for host, _ in where}) == 1
        # each sees the others' GPUs, not only its own
        and (sharing or len(others) == len(where) - 1)
        and all(torch.cuda.can_device_access_peer(device.index, other) for other in others)
    )
    return _agreed(own, group) and _agreed(_works(group, device), group)


def _agreed(answer: bool, group: dist.ProcessGroup) -> bool:
    answers: list[bool] = [False] * dist.get_world_size(group)
    dist.all_gather_object(answers, answer, group=group)
    return all(answers)


def _works(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether processes may share memory, which a container may forbid."""
    try:
        SharedBuffer(1, torch.empty(0, device=device), group.group_name).close()
    except RuntimeError as error:
        logger.warning(
            "ranks can't share GPU memory (%s): exchange by NCCL alone",
            str(error).strip().splitlines()[0],
        )
        return False
    return True


def _boot_id() -> str:
    """The same for all processes of a machine, and for no others."""
    with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
        return file.read()
