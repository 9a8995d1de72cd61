"""What the step does with gradients once the backward pass is through: sums over tp, the global norm, clipping.

A parameter split over tp is a DTensor on (dp, tp), one that is replicated over tp a DTensor on (dp) alone. The local
shards of all of them together are everything that this rank holds, and all that is done here is done on those.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tp_trainer.parallel.mesh import Mesh
from tp_trainer.parallel.tensor import local


def is_split_over_tp(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor) and "tp" in (parameter.device_mesh.mesh_dim_names or ())


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """This rank's shards of the gradients (DTensor or plain), those that are empty here left out."""
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    return [g for g in grads if g.numel()]


@torch.no_grad()
def sum_over_tp(parameters: Sequence[nn.Parameter], mesh: Mesh) -> None:
    """Add up, in place and in one all-reduce, gradients of which each rank of the TP group holds a part of the sum."""
    grads = local_gradients(parameters)
    if mesh.tp_size == 1 or not grads:
        return
    bucket = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(bucket, group=mesh.tp.get_group())
    for grad, summed in zip(grads, bucket.split([g.numel() for g in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


@torch.no_grad()
def global_norm(parameters: Sequence[nn.Parameter], mesh: Mesh, loss: torch.Tensor) -> torch.Tensor:
    """The 2-norm of the whole gradient, float32 scalar, the same on all ranks; nan where any rank's loss is no number.

    Shards of split parameters add up over dp and tp; those of replicated ones over dp alone.
    """
    squares = torch.stack([_square(parameters, True, mesh.device), _square(parameters, False, mesh.device)])
    squares[0] += loss * 0
    if mesh.full["dp"].size() > 1:
        dist.all_reduce(squares, group=mesh.full["dp"].get_group())
    if mesh.tp_size > 1:
        dist.all_reduce(squares[:1], group=mesh.tp.get_group())
    return squares.sum().sqrt()


def _square(parameters: Sequence[nn.Parameter], split: bool, device: torch.device) -> torch.Tensor:
    grads = local_gradients(p for p in parameters if is_split_over_tp(p) is split)
    if not grads:
        return torch.zeros((), device=device)
    if device.type == "cpu":  # torch adds up one number after the other there: at once, 5e7 numbers in float32 are off by 4e-3
        return torch.cat([torch.linalg.vector_norm(g, dim=-1).flatten() for g in grads]).double().square().sum().float()
    norms: list[torch.Tensor] = []
    for kind in {g.dtype for g in grads}:  # one call takes one
        norms += torch._foreach_norm([g for g in grads if g.dtype == kind], 2.0, dtype=torch.float32)
    return torch.stack(norms).square().sum()


def clip_divisor(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """What gradients are divided by, so that their global norm is at most `limit` (as torch's clip_grad_norm_)."""
    return torch.clamp((norm + 1e-6) / limit, min=1.0)
