"""What a rank needs of its device's memory, by arithmetic, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tp_trainer.parallel.loss import CHUNK_TOKENS
from tp_trainer.parallel.tensor import Part, Role, split_dim

MASTER, MOMENTS = 4, 8  # bytes a trained parameter: float32, and AdamW's two moments
USABLE = 0.97  # of the device's memory: the rest is the context's, NCCL's, and lost to fragments


@dataclass(frozen=True)
class Memory:
    """What a rank holds where nothing is sharded over dp.

    Attributes:
        trained, frozen: parameters of this rank's, in numbers.
        activations: bytes that are kept for the backward pass, those of the head's chunk included.
        compute: bytes of a number in the dtype of compute.
        gradient: bytes of a parameter's gradient.
    """

    trained: int
    frozen: int
    activations: int
    compute: int
    gradient: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Sequence[nn.Module],
        table: Mapping[str, Part],
        tp: int,
        tokens: int,
        *,
        recomputed: bool,
        accumulated: bool,
        compute: torch.dtype,
    ) -> Memory:
        """Of the meta model before it is split.

        Args:
            layers: the decoder's blocks.
            table: full module name -> its part of the split.
            tokens: of a micro-batch.
            recomputed: whether a block's activations are formed again in the backward pass.
            accumulated: whether gradients of several micro-batches are added up (in float32).
        """
        trained = frozen = 0
        for name, parameter in model.named_parameters():  # tied ones once
            module, _, key = name.rpartition(".")
            count = parameter.numel()
            if split_dim(table.get(module), key) is not None:
                count = -(-count // tp)
            if parameter.requires_grad:
                trained += count
            else:
                frozen += count
        size, vocabulary, width = compute.itemsize, *_head_shape(model)
        names = {id(module): name for name, module in model.named_modules()}
        blocks = [_kept(layer, names, table, tp) for layer in layers]
        kept = max(blocks) + width // tp * len(blocks) if recomputed else sum(blocks)
        # logits and their gradient exist for a chunk of tokens at a time
        head = 2 * min(tokens, CHUNK_TOKENS) * -(-vocabulary // tp)
        activations = (tokens * kept + head) * size
        return cls(trained, frozen, activations, size, 4 if accumulated else size)

    @property
    def bytes(self) -> int:
        """In all, with copies in the dtype of compute beside the float32 parameters."""
        each = MASTER + MOMENTS + self.gradient + self.compute
        return self.trained * each + self.frozen * self.compute + self.activations


def _head_shape(model: Any) -> tuple[int, int]:
    """(vocabulary, hidden)"""
    vocabulary, width = model.get_output_embeddings().weight.shape
    return vocabulary, width


def _kept(layer: nn.Module, names: Mapping[int, str], table: Mapping[str, Part], tp: int) -> int:
    """Numbers a token that a block keeps: what its linears give, its input and the attention's."""
    features = widest = 0
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            part = table.get(names[id(module)])
            split = part is not None and part.role is not Role.SHARED_HEADS
            features += module.out_features // (tp if split else 1)
            if part is not None and part.role is Role.ROW:
                widest = max(widest, module.out_features // tp)
    return features + 2 * widest
