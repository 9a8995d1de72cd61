"""What the step does with gradients once the backward pass is through: sums over tp, the global
norm, clipping.

A parameter split over tp is a DTensor on (dp, tp), one that is replicated over tp a DTensor on (dp)
alone. The local shards of all of them together are everything that this rank holds, and all that is
done here is done on those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from tp_trainer.parallel.mesh import Axis, Mesh
from tp_trainer.parallel.tensor import local


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """This rank's shards of the gradients (DTensor or plain), empty ones left out."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    return [g for g in grads if g.numel()]


@torch.no_grad()
def sum_over_tp(parameters: Sequence[nn.Parameter], mesh: Mesh) -> None:
    """Add up, in place and in one all-reduce, gradients of which each rank of the TP group holds a
    part of the sum.
    """
    grads = local_gradients(parameters)
    if mesh.tensor.size == 1 or not grads:
        return
    bucket = torch.cat([g.flatten() for g in grads])
    mesh.tensor.all_reduce(bucket)
    for grad, summed in zip(grads, bucket.split([g.numel() for g in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


@torch.no_grad()
def global_norm(parameters: Sequence[nn.Parameter], mesh: Mesh, loss: torch.Tensor) -> torch.Tensor:
    """The 2-norm of the whole gradient, float32 scalar, the same on all ranks; NaN where the loss
    isn't finite.

    The squares of shards add up over the axes that a parameter is split over.
    """
    groups: dict[tuple[Axis, ...], list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(mesh.axes(parameter), []).append(parameter)
    axes = sorted(groups, key=len, reverse=True)  # the same order on all ranks
    squares = [_square(groups[each], mesh.device) for each in axes]
    for axis in (mesh.shard, mesh.tensor):
        split = [number for number, each in enumerate(axes) if axis in each]
        if axis.size > 1 and split:
            part = torch.stack([squares[number] for number in split])
            axis.all_reduce(part)
            for number, whole in zip(split, part.unbind(), strict=True):
                squares[number] = whole
    return torch.stack(squares).sum().sqrt() + loss * 0


def _square(parameters: Sequence[nn.Parameter], device: torch.device) -> torch.Tensor:
    grads = local_gradients(parameters)
    if not grads:
        return torch.zeros((), device=device)
    # torch adds up one number after the other there: at once, 5e7 numbers in float32 are off by
    # 4e-3
    if device.type == "cpu":
        return (
            torch.cat([torch.linalg.vector_norm(g, dim=-1).flatten() for g in grads])
            .double()
            .square()
            .sum()
            .float()
        )
    norms: list[torch.Tensor] = []
    for kind in {g.dtype for g in grads}:  # one call takes one
        norms += torch._foreach_norm(
            [g for g in grads if g.dtype == kind], 2.0, dtype=torch.float32
        )
    return torch.stack(norms).square().sum()


def clip_divisor(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """What gradients are divided by, so that their global norm is at most `limit` (as torch's
    clip_grad_norm_).
    """
    return torch.clamp((norm + 1e-6) / limit, min=1.0)
