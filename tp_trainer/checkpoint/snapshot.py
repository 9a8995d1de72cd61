"""The copy of a rank's state from which a checkpoint is written while training goes on: on the
device, on the host, or none.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch

from tp_trainer.host import free_host_memory

ALIGNMENT = 64  # bytes; every dtype may be viewed there
# of a device's memory that a copy leaves alone: whichever is more
MARGIN_BYTES, MARGIN_PART = 2 << 30, 0.05
HOST_PART = 0.8  # of the host's free memory that the copies of its ranks may take


class Snapshots:
    """Takes a copy of tensors, again and again of the same ones. What a copy on the host takes is
    kept for the next.
    """

    def __init__(self, device: torch.device, asynchronous: bool) -> None:
        self.device, self.asynchronous = device, asynchronous
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.host: torch.Tensor | None = None
        self.unpin: Callable[[], object] = lambda: None
        self.peak = 0  # bytes that the training alone has taken of the device at most
        self.cloned = 0  # bytes of the last copy on the device

    def take(self, tensors: Mapping[str, torch.Tensor]) -> Snapshot:
        """Copy, on the device where there is room beside what a step takes, else on the host, else
        not at all.
        """
        if not self.asynchronous:
            return Snapshot(self, dict(tensors), "none")
        on_device = {
            name: tensor for name, tensor in tensors.items() if tensor.device.type == "cuda"
        }
        if self.stream is not None and (copies := self._on_device(on_device)) is not None:
            copies |= {
                name: tensor.clone() for name, tensor in tensors.items() if name not in on_device
            }
            return Snapshot(self, copies, "device")
        if (copies := self._on_host(tensors)) is not None:
            return Snapshot(self, copies, "host")
        return Snapshot(self, dict(tensors), "none")

    def _on_device(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """Clones on the device; None where the next step would no longer fit beside them."""
        needed = sum(tensor.nbytes for tensor in tensors.values())
        free, total = torch.cuda.mem_get_info(self.device)
        # what the allocator holds but doesn't use now is what a step uses at its peak: room is what
        # lies above that
        self.peak = max(self.peak, torch.cuda.max_memory_allocated(self.device) - self.cloned)
        room = (
            free
            + torch.cuda.memory_reserved(self.device)
            - self.peak
            - max(MARGIN_BYTES, int(MARGIN_PART * total))
        )
        self.cloned = 0
        if needed > room:
            return None
        try:
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
        except torch.OutOfMemoryError:  # in pieces that are too small
            return None
        self.cloned = needed
        return copies

    def _on_host(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
        """Copies in one buffer of host memory; None where the ranks of this host wouldn't find as
        much.
        """
        begins, end = [], 0
        for tensor in tensors.values():
            begins.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if self.host is None or self.host.numel() < end:
            self.unpin()
            self.host = None
            free = free_host_memory()
            if free is not None and end * ranks_here() > HOST_PART * free:
                return None
            self.host = torch.empty(end, dtype=torch.uint8)
            # pinned: copies are several times as fast. Where it can't be, it stays as it is
            if self.stream is not None:
                runtime, address = torch.cuda.cudart(), self.host.data_ptr()
                if int(runtime.cudaHostRegister(address, end, 0)) == 0:
                    # before the memory is free
                    self.unpin = weakref.finalize(self, runtime.cudaHostUnregister, address)
        copies = {}
        for begin, (name, tensor) in zip(begins, tensors.items(), strict=True):
            copies[name] = (
                self.host[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            )
            copies[name].copy_(tensor, non_blocking=True)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).synchronize()
        return copies


class Snapshot:
    """Tensors as they were, to be taken out one by one."""

    def __init__(self, snapshots: Snapshots, tensors: dict[str, torch.Tensor], where: str) -> None:
        self.tensors, self.where, self.stream, self.device = (
            tensors,
            where,
            snapshots.stream,
            snapshots.device,
        )
        self.ready = (
            torch.cuda.current_stream(self.device).record_event()
            if self.stream is not None
            else None
        )

    def take(self, name: str) -> torch.Tensor:
        """A tensor, which is forgotten here: on the device its memory is free for the training once
        the caller is done with it.
        """
        return self.tensors.pop(name)

    def reading(self) -> AbstractContextManager[object]:
        """Where the writing thread reads them: on its own stream, after the copies are made."""
        if self.stream is None:
            return nullcontext()
        torch.cuda.set_device(self.device)  # of this thread
        assert self.ready is not None
        self.stream.wait_event(self.ready)
        return torch.cuda.stream(self.stream)


def ranks_here() -> int:
    """Ranks on this host; the world's where the launcher doesn't say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or torch.distributed.get_world_size())
