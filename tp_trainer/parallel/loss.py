"""Vocabulary-parallel, chunked linear cross-entropy: from hidden states to the summed loss without whole logits.

Each rank holds vocab / tp rows of the head. Logits exist for `CHUNK_TOKENS` tokens and this rank's rows at a time;
the softmax over the whole vocabulary takes two small all-reduces a chunk (Megatron-LM, arXiv:1909.08053, section 3),
and gradients are formed in the forward pass, while the chunk's logits are there (Cut/Liger cross-entropy).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tp_trainer.parallel.collectives import TensorRegion

IGNORE_INDEX = -100
CHUNK_TOKENS = 2048


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, region: TensorRegion, first: int,
        softcap: float | None, needs_gradient: bool,
    ) -> torch.Tensor:  # fmt: skip
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_gradient else None
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            h, target = hidden[start : start + CHUNK_TOKENS], labels[start : start + CHUNK_TOKENS]
            counts = target != IGNORE_INDEX
            local = target - first
            mine = counts & (local >= 0) & (local < weight.shape[0])  # the label is one of this rank's rows
            local = torch.where(mine, local, 0)
            logits = F.linear(h, weight).float()
            slope = None  # of the cap
            if softcap is not None:
                logits = (logits / softcap).tanh_()
                slope = 1 - logits.square() if needs_gradient else None
                logits *= softcap
            peak = region.all_reduce(logits.amax(dim=-1), "max")
            at_label = torch.where(mine, logits.gather(1, local[:, None]).squeeze(1) - peak, 0.0)
            probabilities = logits.sub_(peak[:, None]).exp_()
            total, at_label = region.all_reduce(torch.stack((probabilities.sum(dim=-1), at_label))).unbind()
            loss += torch.where(counts, total.log() - at_label, 0.0).sum()
            if grad_hidden is not None and grad_weight is not None:
                probabilities.mul_((counts / total)[:, None])
                probabilities.scatter_add_(1, local[:, None], -mine.float()[:, None])
                if slope is not None:
                    probabilities.mul_(slope)
                grad_logits = probabilities.to(hidden.dtype)
                torch.mm(grad_logits, weight, out=grad_hidden[start : start + CHUNK_TOKENS])
                grad_weight += grad_logits.t() @ h
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * scale.to(grad_hidden.dtype), grad_weight * scale.to(grad_weight.dtype), None, None, None, None, None


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, region: TensorRegion, first: int, softcap: float | None = None
) -> torch.Tensor:
    """The cross-entropy of `hidden @ weight.T` against `labels`, summed over the tokens that count.

    Args:
        hidden: [tokens, hidden], the same on every rank of the TP group; its gradient is this rank's part of a sum.
        weight: [vocab / tp, hidden], this rank's rows of the head.
        labels: int64 [tokens], ids of the whole vocabulary, IGNORE_INDEX where none counts.
        region: the TP group.
        first: the id of this rank's first row.
        softcap: logits are squashed to softcap x tanh(logits / softcap) (Gemma 2, arXiv:2408.00118).

    Returns:
        float32 scalar, the same on every rank of the TP group, not divided by anything.
    """
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, labels, region, first, softcap, needs_gradient)
