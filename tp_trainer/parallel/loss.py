"""Vocabulary-parallel, chunked linear cross-entropy: from hidden states to the summed loss without
whole logits.

Each rank holds vocab / tp rows of the head. Logits exist for `CHUNK_TOKENS` tokens and this rank's
rows at a time; the softmax over the whole vocabulary takes two small all-reduces a chunk
(Megatron-LM, arXiv:1909.08053, section 3), and gradients are formed in the forward pass, while the
chunk's logits are there (Cut/Liger cross-entropy).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from tp_trainer.batch import IGNORE_INDEX
from tp_trainer.parallel.collectives import TensorRegion

CHUNK_TOKENS = 4096


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """In float32, squashed to softcap x tanh(logits / softcap) where there is one."""
    wide = logits.float()
    return wide if softcap is None else softcap * torch.tanh(wide / softcap)


class _Passes:
    """The passes over a chunk's logits, in place: each works with what the last one has left."""

    def __init__(
        self, logits: torch.Tensor, local: torch.Tensor, mine: torch.Tensor, softcap: float | None
    ) -> None:
        """
        Args:
            logits: [tokens, vocab / tp], lost.
            local, mine: [tokens], the label's row of this rank's, and whether it is one.
        """
        self.logits, self.local, self.mine, self.softcap = logits, local, mine, softcap

    def peak(self) -> torch.Tensor:
        """float32 [tokens]"""
        self.capped = capped(self.logits, self.softcap)
        return self.capped.amax(dim=-1)

    def sums(self, peak: torch.Tensor) -> torch.Tensor:
        """float32 [2, tokens]: of exp(logit - peak) over this rank's rows; logit - peak at the
        label, where it is one of them.
        """
        self.slope = None if self.softcap is None else 1 - (self.capped / self.softcap).square()
        shifted = self.capped.sub_(peak[:, None])
        at_label = torch.where(self.mine, shifted.gather(1, self.local[:, None]).squeeze(1), 0.0)
        return torch.stack((shifted.exp_().sum(dim=-1), at_label))

    def slopes(self, peak: torch.Tensor, total: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The loss's gradient by the logits, in their dtype: softmax, less one at the label, where
        the token counts.
        """
        slopes = self.capped.mul_((counts / total)[:, None])
        slopes.scatter_add_(1, self.local[:, None], -self.mine.float()[:, None])
        return (slopes if self.slope is None else slopes.mul_(self.slope)).to(self.logits.dtype)


class _CompiledPasses(_Passes):
    """The same, each pass one kernel that reads the logits as they came, in low precision, and
    writes nothing as large but slopes.
    """

    def peak(self) -> torch.Tensor:
        return _compiled(_peak)(self.logits, self.softcap)

    def sums(self, peak: torch.Tensor) -> torch.Tensor:
        return _compiled(_sums)(self.logits, peak, self.local, self.mine, self.softcap)

    def slopes(self, peak: torch.Tensor, total: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return _compiled(_slopes)(
            self.logits, peak, counts / total, self.local, self.mine, self.softcap
        )


def _peak(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return capped(logits, softcap).amax(dim=-1)


def _sums(
    logits: torch.Tensor,
    peak: torch.Tensor,
    local: torch.Tensor,
    mine: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    shifted = capped(logits, softcap) - peak[:, None]
    return torch.stack(
        (
            shifted.exp().sum(dim=-1),
            torch.where(mine, shifted.gather(1, local[:, None]).squeeze(1), 0.0),
        )
    )


def _slopes(
    logits: torch.Tensor,
    peak: torch.Tensor,
    factor: torch.Tensor,
    local: torch.Tensor,
    mine: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    wide = capped(logits, softcap)
    label = (torch.arange(logits.shape[1], device=logits.device) == local[:, None]) & mine[:, None]
    slopes = (wide - peak[:, None]).exp() * factor[:, None] - label.float()
    return (slopes if softcap is None else slopes * (1 - (wide / softcap).square())).to(
        logits.dtype
    )


@cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Not before it is wanted: the compiler takes more than a second to import."""
    return torch.compile(function, dynamic=False)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        region: TensorRegion,
        first: int,
        softcap: float | None,
        needs_gradient: bool,
        compiled: bool,
    ) -> torch.Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grad_weight = grad_bias = None
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            h, target = hidden[start : start + CHUNK_TOKENS], labels[start : start + CHUNK_TOKENS]
            counts = target != IGNORE_INDEX
            local = target - first
            # the label is one of this rank's rows
            mine = counts & (local >= 0) & (local < weight.shape[0])
            local = torch.where(mine, local, 0)
            passes = (_CompiledPasses if compiled else _Passes)(
                F.linear(h, weight, bias), local, mine, softcap
            )
            peak = region.all_reduce(passes.peak(), "max")
            total, at_label = region.all_reduce(passes.sums(peak)).unbind()
            loss += torch.where(counts, total.log() - at_label, 0.0).sum()
            if grad_hidden is not None:
                slopes = passes.slopes(peak, total, counts)
                torch.mm(slopes, weight, out=grad_hidden[start : start + CHUNK_TOKENS])
                grad_weight = _add_matmul(grad_weight, slopes.t(), h)
                if bias is not None:
                    own = slopes.float().sum(0)
                    grad_bias = own if grad_bias is None else grad_bias.add_(own)
        if grad_hidden is not None and grad_weight is not None:
            grad_bias = None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype), grad_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            grad_weight * scale.to(grad_weight.dtype),
            None if grad_bias is None else grad_bias * scale.to(grad_bias.dtype),
            None,
            None,
            None,
            None,
            None,
            None,
        )


def _add_matmul(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b in float32, `total` being overwritten; without one a @ b."""
    if a.is_cuda and a.dtype != torch.float32:  # the matmul itself leaves the sum unrounded
        return (
            torch.mm(a, b, out_dtype=torch.float32)
            if total is None
            else torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        )
    return (a @ b).float() if total is None else total.add_(a @ b)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    region: TensorRegion,
    first: int,
    softcap: float | None = None,
    compiled: bool = False,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The cross-entropy of `hidden @ weight.T + bias` against `labels`, summed over the tokens that
    count.

    Args:
        hidden: [tokens, hidden], the same on every rank of the TP group; its gradient is this
            rank's part of a sum.
        weight: [vocab / tp, hidden], this rank's rows of the head.
        labels: int64 [tokens], ids of the whole vocabulary, IGNORE_INDEX where none counts.
        region: the TP group.
        first: the id of this rank's first row.
        softcap: logits are squashed to softcap x tanh(logits / softcap) (Gemma 2,
            arXiv:2408.00118).
        compiled: whether torch.compile makes the passes over the logits one kernel each.
        bias: [vocab / tp], this rank's.

    Returns:
        float32 scalar, the same on every rank of the TP group, not divided by anything.
    """
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, region, first, softcap, needs_gradient, compiled
    )
