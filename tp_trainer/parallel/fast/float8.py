"""Matmuls in float8: those of a block's linears, forward and backward (`parallelism.float8`).

Each matrix is scaled by one number, found anew each time, so that its largest element is the
largest of its format: e4m3 for activations and weights, e5m2 for gradients (Micikevicius et al.
2022, arXiv:2209.05433). Sums are float32, results come in the dtype of compute. With sequence
parallelism a block's rows are gathered in float8 too, which changes nothing more: all ranks scale
theirs by the same number. Weights, optimizer, norms, attention, embedding, head and sums over ranks
are what they are without.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tp_trainer.parallel.collectives import (
    TensorRegion,
    all_gather,
    all_reduce,
    reduce_scatter,
)
from tp_trainer.parallel.tensor import Part, Role, local, residual_stream

MULTIPLE = 16  # of which the sizes of a float8 matmul must be
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


class Low(NamedTuple):
    """A matrix in float8."""

    whole: torch.Tensor  # [batch, seq, features], the tensor that it stands for
    values: torch.Tensor  # [batch x seq, features]
    scale: torch.Tensor  # float32 scalar, brings it back


class Float8Region(TensorRegion):
    """The way into and out of a block whose linears multiply in float8."""

    low: Low | None = None  # a block's input in float8, while the block is under way

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return linear(x, weight, bias, self.low)

    def linear_and_leave(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self.sequence_parallel and fits(*x.flatten(0, -2).shape, *weight.shape):
            return linear_and_leave(x, weight, self.group, self.size)
        return super().linear_and_leave(x, weight)


def gather_in_float8(model: nn.Module, table: Mapping[str, Part], region: Float8Region) -> None:
    """Have the regions of the split model gather their input in float8, in place, where all linears
    that it is given to multiply so.
    """
    if not region.sequence_parallel:
        return
    for name, part in table.items():
        module: Any = model.get_submodule(name)
        linears = [each for each in module.children() if isinstance(each, nn.Linear)]
        taking = [each for each in linears if _role(each) is not Role.ROW]
        if part.role is Role.REGION and all(map(_in_float8, taking)):
            module.forward = MethodType(_region, module)


def _region(module: Any, *args: Any, **kwargs: Any) -> Any:
    region: Float8Region = module.tp_region
    x, rest = residual_stream(args, kwargs)
    if not fits(x.shape[1] * region.size):
        return type(module).forward(module, region.enter(x), *rest, **kwargs)
    region.low = gather(x, region.batch, region.group, region.size)
    out = type(module).forward(module, region.low.whole, *rest, **kwargs)
    region.low = None
    return out


def _role(module: Any) -> Role | None:
    part = getattr(module, "tp_part", None)
    return None if part is None else part.role


def _in_float8(linear: Any) -> bool:
    return _role(linear) in (Role.COLUMN, Role.FUSED) and fits(*local(linear.weight).shape)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, low: Low | None = None
) -> torch.Tensor:
    """F.linear. Matmuls whose sizes are no multiples of MULTIPLE stay in the dtype of compute.

    Args:
        x: [..., in]
        weight: [out, in]
        bias: [out]
        low: x, if it has been brought to float8 already; it is used if it is x.
    """
    rows = x.flatten(0, -2)
    if not fits(*rows.shape, *weight.shape):
        return F.linear(x, weight, bias)
    given = low[1:] if low is not None and low.whole is x else (None, None)
    out = _Linear.apply(rows, weight, *given, None, 1).view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def linear_and_leave(x: torch.Tensor, weight: torch.Tensor, group: str, size: int) -> torch.Tensor:
    """A linear of which each rank has a part of the inputs: its output is summed over them, and
    each goes on with a part of the rows.

    Args:
        x: [batch, seq, in / size]
        weight: [out, in / size]
        group, size: the tp group's name and its number of ranks.

    Returns:
        [1, batch x seq / size, out]. Its gradient is gathered in float8, half the bytes.
    """
    return _Linear.apply(x.flatten(0, -2), weight, None, None, group, size)[None]


def gather(x: torch.Tensor, batch: int, group: str, size: int) -> Low:
    """The rows of all ranks, sent in float8: what linears that are given them would have made of
    them.

    Args:
        x: [1, batch x seq / size, features], this rank's.
    """
    with torch.no_grad():
        own, scale = quantised(x.flatten(0, -2), FORWARD, scale_of(x, FORWARD, group))
        values = _gathered(own, group, size)
    whole = _Restore.apply(x, values, scale, group, size)
    return Low(whole.view(batch, -1, x.shape[-1]), values, scale)


def fits(*sizes: int) -> bool:
    """Whether the hardware multiplies matrices of these sizes."""
    return all(size % MULTIPLE == 0 for size in sizes)


def scale_of(x: torch.Tensor, dtype: torch.dtype, group: str | None = None) -> torch.Tensor:
    """The float32 scalar by which x is multiplied, so that its largest element, or that of all of a
    group's, is the dtype's largest.
    """
    largest = x.abs().amax().float()
    if group is not None:
        largest = all_reduce(largest, group, "max")
    return torch.finfo(dtype).max / largest.clamp(min=1e-12)


def quantised(
    x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x in float8, and the float32 scalar that brings it back; `scale` where it is known."""
    largest, scale = torch.finfo(dtype).max, scale_of(x, dtype) if scale is None else scale
    return (x.float() * scale).clamp(-largest, largest).to(dtype), scale.reciprocal()


def _gathered(low: torch.Tensor, group: str, size: int) -> torch.Tensor:
    return all_gather(low.view(torch.uint8), group, size).view(low.dtype)


class _Restore(torch.autograd.Function):
    """What rows stand for once they have been gathered; for its shape and gradient, and compiled to
    nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, group: str, size: int
    ) -> torch.Tensor:
        ctx.group, ctx.size = group, size
        return _cast(values.float() * scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return reduce_scatter(gradient, ctx.group, ctx.size)[None], None, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        low_x: torch.Tensor | None,
        scale_x: torch.Tensor | None,
        group: str | None,
        size: int,
    ) -> torch.Tensor:
        if low_x is None or scale_x is None:
            low_x, scale_x = quantised(x, FORWARD)
        scale = scale_of(weight, FORWARD)
        low_weight, scale_weight = quantised(weight, FORWARD, scale)
        # not the weight in float8, one more copy of the model
        ctx.save_for_backward(low_x, scale_x, weight, scale)
        ctx.group, ctx.size = group, size
        out = matmul(low_x, scale_x, low_weight, scale_weight, x.dtype)
        return out if group is None else reduce_scatter(out, group, size)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        low_x, scale_x, weight, known = ctx.saved_tensors
        low, scale = quantised(gradient, BACKWARD, scale_of(gradient, BACKWARD, ctx.group))
        if ctx.group is not None:
            low = _gathered(low, ctx.group, ctx.size)
        low_weight, scale_weight = quantised(weight, FORWARD, known)
        grad_x = matmul(low, scale, low_weight.t().contiguous(), scale_weight, gradient.dtype)
        grad_weight = matmul(
            low.t().contiguous(), scale, low_x.t().contiguous(), scale_x, weight.dtype
        )
        return grad_x, grad_weight, None, None, None, None


def matmul(
    a: torch.Tensor,
    scale_a: torch.Tensor,
    b: torch.Tensor,
    scale_b: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """a @ b.T of [rows, inner] and [columns, inner], the only order in which the hardware takes
    them.
    """
    if not a.is_cuda:  # where torch's own takes thousands of times as long
        return _cast((a.float() @ b.float().t()) * (scale_a * scale_b), dtype)
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype). With torch 2.11 a Function that ends in one that does nothing loses its gradient
    when it is compiled.
    """
    return x if x.dtype == dtype else x.to(dtype)
