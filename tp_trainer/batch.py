"""A micro-batch of tokens: made by `data`, carried unchanged to rotary embedding, attention and
loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch

IGNORE_INDEX = -100  # the label that doesn't count, torch's own


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, int64 [rows, seq] each.

    Attributes:
        input_ids: tokens.
        labels: what follows each of them (shifted already); IGNORE_INDEX carries no loss.
        position_ids: each token's position, which restarts where a document begins inside a row.
        document_ids: which document of its row a token belongs to; attention stays inside one.
            None: a row is one document.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor | None = None

    @classmethod
    def of_rows(cls, input_ids: torch.Tensor, labels: torch.Tensor) -> Batch:
        """Rows of one document each, int64 [rows, seq]; positions count from 0."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return cls(input_ids, labels, positions.expand(input_ids.shape).contiguous())

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those that are there, in the order of the fields."""
        return [
            each
            for each in (getattr(self, field.name) for field in fields(self))
            if each is not None
        ]

    def count_labels(self) -> torch.Tensor:
        """int64 scalar: the labels that count."""
        return (self.labels != IGNORE_INDEX).sum()

    def rows(self, start: int, stop: int) -> Batch:
        """Some of the rows."""
        return self._with(each[start:stop] for each in self.tensors)

    def to(self, device: torch.device) -> Batch:
        """On a device; for GPUs through pinned memory, which the host doesn't have to wait for."""
        if self.input_ids.device == device:
            return self
        given = (each.pin_memory() if device.type == "cuda" else each for each in self.tensors)
        return self._with(each.to(device, non_blocking=True) for each in given)

    def clone(self) -> Batch:
        """Memory of its own: the inputs of a CUDA graph, which `copy_` fills."""
        return self._with(each.clone() for each in self.tensors)

    def copy_(self, other: Batch) -> None:
        """Take over another batch of the same shape, in place."""
        for own, given in zip(self.tensors, other.tensors, strict=True):
            own.copy_(given)

    def _with(self, tensors: Iterable[torch.Tensor]) -> Batch:
        return Batch(*tensors)
