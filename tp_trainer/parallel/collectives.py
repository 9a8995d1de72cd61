"""The four tensor-parallel collectives with their gradients, on plain local tensors.

Megatron-LM's f and g (Shoeybi et al. 2019, arXiv:1909.08053) and their sequence-parallel forms
(Korthikanti et al. 2022, arXiv:2205.05198). They call the functional collectives and wait at once,
so that no lazily awaited tensor enters a compiled block, where its gradient is silently lost.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

_ops = torch.ops._c10d_functional


def all_reduce(x: torch.Tensor, group: str, op: str = "sum") -> torch.Tensor:
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), op, group))


def all_gather(x: torch.Tensor, group: str, size: int, dim: int = 0) -> torch.Tensor:
    # [size * x.shape[0], ...]
    gathered = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), size, group))
    return gathered if dim == 0 else torch.cat(gathered.chunk(size), dim=dim)


def reduce_scatter(x: torch.Tensor, group: str, size: int, dim: int = 0) -> torch.Tensor:
    stacked = x if dim == 0 else torch.cat(x.chunk(size, dim=dim))
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(stacked.contiguous(), "sum", size, group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str, size: int, dim: int) -> torch.Tensor:
        ctx.group, ctx.size, ctx.dim = group, size, dim
        return all_gather(x, group, size, dim)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return reduce_scatter(grad, ctx.group, ctx.size, ctx.dim), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str, size: int) -> torch.Tensor:
        ctx.group, ctx.size = group, size
        return reduce_scatter(x, group, size, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_gather(grad, ctx.group, ctx.size, 0), None, None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str, size: int, rank: int) -> torch.Tensor:
        ctx.size, ctx.rank = size, rank
        return all_gather(x, group, size)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad.chunk(ctx.size)[ctx.rank], None, None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str, size: int, rank: int) -> torch.Tensor:
        ctx.group, ctx.size = group, size
        return x.chunk(size)[rank]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return all_gather(grad, ctx.group, ctx.size), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(grad, ctx.group), None


class TensorRegion:
    """The way into and out of the part of a block whose weights are split over tp.

    Between blocks the residual stream is [1, batch x seq / tp, hidden] with sequence parallelism
    (this rank's part of all tokens, row after row, so that collectives find it in one piece) and
    [batch, seq, hidden], the same on every rank of the TP group, without; inside it is [batch, seq,
    hidden] either way.
    """

    def __init__(
        self,
        group: str,
        size: int,
        rank: int,
        sequence_parallel: bool,
        compiled: bool = False,
    ) -> None:
        """`compiled`: whether what works with it may be compiled."""
        self.group, self.size, self.rank, self.compiled = group, size, rank, compiled
        self.sequence_parallel = sequence_parallel and size > 1
        self.batch = 1  # sequences of the micro-batch under way

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Residual stream -> whole sequences. Its gradient is summed over tp on the way back."""
        if self.size == 1:
            return x
        if not self.sequence_parallel:
            return _Enter.apply(x, self.group)
        return _Gather.apply(x, self.group, self.size, 0).view(self.batch, -1, x.shape[-1])

    def leave(self, partial: torch.Tensor) -> torch.Tensor:
        """Partial sums over whole sequences -> residual stream."""
        if self.size == 1:
            return partial
        if not self.sequence_parallel:
            return _Leave.apply(partial, self.group)
        return _Scatter.apply(
            partial.reshape(self.size, -1, partial.shape[-1]), self.group, self.size
        )

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Residual stream -> whole sequences, with which every rank does the same: so are its
        gradients the same, and not summed.
        """
        if not self.sequence_parallel:
            return x
        whole = _Whole.apply(x, self.group, self.size, self.rank)
        return whole.view(self.batch, -1, x.shape[-1])

    def share(self, whole: torch.Tensor) -> torch.Tensor:
        """Whole sequences, the same on every rank -> residual stream."""
        if not self.sequence_parallel:
            return whole
        parts = whole.reshape(self.size, -1, whole.shape[-1])
        return _Share.apply(parts, self.group, self.size, self.rank)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """[..., in], [out, in], [out] -> [..., out]"""
        return F.linear(x, weight, bias)

    def linear_and_leave(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """A linear of which each rank has a part of the inputs: [batch, seq, in / tp],
        [out, in / tp] -> residual stream.
        """
        return self.leave(self.linear(x, weight, None))

    def gather_features(self, x: torch.Tensor) -> torch.Tensor:
        """[..., features / tp] -> [..., features], where each rank goes on with another part of
        them.
        """
        return x if self.size == 1 else _Gather.apply(x, self.group, self.size, -1)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over tp, where each rank goes on with it in its own way: gradients are summed as
        well.
        """
        return x if self.size == 1 else _Sum.apply(x, self.group)

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """All-reduce outside autograd."""
        return x if self.size == 1 else all_reduce(x, self.group, op)
