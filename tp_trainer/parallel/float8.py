"""The products of a block's linears in float8, in the forward and in the backward pass (`parallelism.float8`).

Each matrix is scaled by one number, found anew each time, so that its largest element is the largest of its format: e4m3 for
activations and weights, e5m2 for gradients (Micikevicius et al. 2022, arXiv:2209.05433). Sums are float32, results come in
the dtype of compute. Weights, optimizer, norms, attention, embedding, head and what ranks exchange are what they are without.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

MULTIPLE = 16  # of which the sizes of a float8 product must be
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear. Products whose sizes are no multiples of MULTIPLE stay in the dtype of compute.

    Args:
        x: [..., in]
        weight: [out, in]
        bias: [out]
    """
    rows = x.flatten(0, -2)
    if any(size % MULTIPLE for size in (*rows.shape, *weight.shape)):
        return F.linear(x, weight, bias)
    out = _Linear.apply(rows, weight).view(*x.shape[:-1], weight.shape[0])
    return out if bias is None else out + bias


def scale_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The float32 scalar by which x is multiplied, so that its largest element is the largest of the dtype."""
    return torch.finfo(dtype).max / x.abs().amax().float().clamp(min=1e-12)


def quantised(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x in float8, and the float32 scalar that brings it back; `scale` where it is known."""
    largest, scale = torch.finfo(dtype).max, scale_of(x, dtype) if scale is None else scale
    return (x.float() * scale).clamp(-largest, largest).to(dtype), scale.reciprocal()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        low_x, scale_x = quantised(x, FORWARD)
        scale = scale_of(weight, FORWARD)
        low_weight, scale_weight = quantised(weight, FORWARD, scale)
        ctx.save_for_backward(low_x, scale_x, weight, scale)  # not the weight in float8: it would be one more copy of the model
        return _product(low_x, scale_x, low_weight, scale_weight, x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low_x, scale_x, weight, known = ctx.saved_tensors
        low, scale = quantised(gradient, BACKWARD)
        low_weight, scale_weight = quantised(weight, FORWARD, known)
        grad_x = _product(low, scale, low_weight.t().contiguous(), scale_weight, gradient.dtype)
        grad_weight = _product(low.t().contiguous(), scale, low_x.t().contiguous(), scale_x, weight.dtype)
        return grad_x, grad_weight


def _product(a: torch.Tensor, scale_a: torch.Tensor, b: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b.T of [rows, inner] and [columns, inner], the only order in which the hardware takes them."""
    if not a.is_cuda:  # where torch's own takes thousands of times as long
        return ((a.float() @ b.float().t()) * (scale_a * scale_b)).to(dtype)
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)
