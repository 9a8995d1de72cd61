"""Whether parameters that are replicated over tp are still the same on every rank of the TP group,
bit for bit.

Nothing but equal gradients keeps them so: a fault of a kernel, of memory or of a collective would
otherwise go unseen.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist

from tp_trainer.config import Unrecoverable
from tp_trainer.parallel.mesh import Mesh
from tp_trainer.parallel.tensor import local


class Drifted(Unrecoverable):
    """Replicas have come apart."""


def check_replicas(
    named_parameters: Iterable[tuple[str, torch.Tensor]], mesh: Mesh, step: int
) -> None:
    """Raises Drifted, on every rank, where a parameter replicated over tp differs within a TP
    group.
    """
    names = drifted(named_parameters, mesh)
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise Drifted(
            f"step {step}: {names[0]}{more} is replicated over tp and has drifted apart; resume"
            " from an earlier checkpoint"
        )


def drifted(named_parameters: Iterable[tuple[str, torch.Tensor]], mesh: Mesh) -> list[str]:
    """The replicated parameters that differ within any TP group, the same list on every rank; a
    collective.
    """
    replicated = [
        (name, parameter)
        for name, parameter in named_parameters
        if mesh.tensor not in mesh.axes(parameter)
    ]
    if mesh.tensor.size == 1 or not replicated:
        return []
    sums = torch.stack([_checksum(parameter) for _, parameter in replicated])
    extremes = torch.cat([sums, -sums])
    # the greatest, and minus the least
    mesh.tensor.all_reduce(extremes, dist.ReduceOp.MAX)
    differs = (extremes.view(2, -1).sum(0) != 0).int()
    # other TP groups hold other shards, and must end the run together
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    return [name for (name, _), flag in zip(replicated, differs.tolist(), strict=True) if flag]


def _checksum(parameter: torch.Tensor) -> torch.Tensor:
    """int64 scalar of the bytes of this rank's shard, each weighed by its place."""
    data = local(parameter.detach()).contiguous().view(torch.uint8).flatten().long()
    return (data * (torch.arange(data.numel(), device=data.device) % 65521 + 1)).sum()
