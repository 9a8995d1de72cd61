"""The attention that the models call, through transformers' own AttentionInterface.

A function registered without a mask function gets no mask from transformers: causality and sliding
windows are formed here, from the whole sequence, whatever the sequence-parallel layout of the
residual stream outside.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

NAME = "tp_trainer"


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    document_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention over this rank's heads.

    Args:
        query: [batch, heads / tp, seq, head_dim]
        key, value: [batch, kv_heads / tp, seq, head_dim]
        attention_mask: must be None; nothing in training makes one.
        sliding_window: tokens that a position sees, itself included; None = all before it.
        softcap: scores are squashed to softcap x tanh(scores / softcap); this path holds them
            whole.
        document_ids: int64 [batch, seq]; a position sees its own document only. None = the row.

    Returns:
        [batch, seq, heads / tp, head_dim], and None for the weights.
    """
    assert attention_mask is None, "rows are never padded: Batch.document_ids is the mask"
    length = query.shape[2]
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    mask = None
    if window is not None or softcap is not None or document_ids is not None:
        mask = _band(length, window or length, query.device)
    if document_ids is not None:
        assert mask is not None
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if softcap is not None:
        return _softcapped(query, key, value, dropout, scaling, mask, softcap), None
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    mask: torch.Tensor | None,
    softcap: float,
) -> torch.Tensor:
    """Attention with capped scores, which PyTorch's fused kernels don't know: [batch, seq,
    heads / tp, head_dim].

    Args:
        mask: bool [seq, seq] or [batch, 1, seq, seq], what is seen.
    """
    assert mask is not None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3)
    scores = scores * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, float("-inf"))
    weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype), dropout)
    return (weights @ value).transpose(1, 2).contiguous()


@lru_cache(maxsize=4)
def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """bool [length, length]: position i sees i - window < j <= i."""
    i = torch.arange(length, device=device)
    return (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - window)


AttentionInterface.register(NAME, attention)
