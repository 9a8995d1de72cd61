"""Rows of `seq_length` tokens and the next ones, over a memory-mapped file of token ids or made of
random ones; and the loss of a model that knows frequencies alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tp_trainer.messages import PartFound

if TYPE_CHECKING:
    from tp_trainer.batch import Batch


class Rows:
    """Rows over a directory of `prepare`. Row i is tokens[i*S : i*S+S], its labels the ones after:
    every label counts.

    Documents follow one another without padding; what is left at the end is less than a row and
    isn't used.
    """

    def __init__(self, directory: str | Path, seq_length: int) -> None:
        self.directory, self.seq_length = Path(directory), seq_length
        self.meta: dict[str, Any] = json.loads(
            (self.directory / "meta.json").read_text(encoding="utf-8")
        )
        self.tokens = np.memmap(self.directory / "tokens.bin", dtype=self.meta["dtype"], mode="r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_length

    def __getitem__(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1]: the row and the token after it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * self.seq_length
        return self.tokens[start : start + self.seq_length + 1].astype(np.int64)

    def batch(self, indices: Sequence[int]) -> Batch:
        """input_ids and labels, int64 [len(indices), seq_length]; index -1 is a row of zeros whose
        labels don't count."""
        return _batch(self, indices)

    def facts(self) -> PartFound:
        """What was found and became of it."""
        used = len(self) * self.seq_length + 1 if len(self) else 0
        return PartFound(
            documents=self.meta["documents"],
            documents_skipped=self.meta["documents_skipped"],
            skipped=self.meta["skipped"],
            first_skipped=self.meta["first_skipped"],
            tokens=self.meta["tokens"],
            rows=len(self),
            tokens_dropped=len(self.tokens) - used,
        )

    @property
    def counts(self) -> np.ndarray:
        """int64 [ids]: how often each id occurs in all tokens."""
        return np.load(self.directory / "counts.npy")

    @property
    def identity(self) -> str:
        """A digest of the tokens: of how often each occurs, and of a thousand pieces of the text in
        their order."""
        places = np.linspace(0, max(0, len(self.tokens) - 64), 1000, dtype=np.int64)
        pieces = self.tokens[(places[:, None] + np.arange(64)).clip(max=len(self.tokens) - 1)]
        return hashlib.sha256(
            self.counts.tobytes() + pieces.astype(np.int64).tobytes()
        ).hexdigest()[:32]


class RandomRows:
    """Rows of uniformly random tokens: row i is a function of (seed, i)."""

    identity = "random"

    def __init__(self, vocab_size: int, seq_length: int, seed: int, rows: int = 1_000_000) -> None:
        self.vocab_size, self.seq_length, self.seed, self.rows = vocab_size, seq_length, seed, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1]: the row and the token after it."""
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, index])))
        return generator.integers(self.vocab_size, size=self.seq_length + 1)

    def batch(self, indices: Sequence[int]) -> Batch:
        """As `Rows.batch`."""
        return _batch(self, indices)


def _batch(rows: Rows | RandomRows, indices: Sequence[int]) -> Batch:
    import torch

    from tp_trainer.batch import IGNORE_INDEX, Batch

    inputs = np.zeros((len(indices), rows.seq_length), np.int64)
    labels = np.full((len(indices), rows.seq_length), IGNORE_INDEX, np.int64)
    for place, index in enumerate(indices):
        if index != -1:
            window = rows[int(index)]
            inputs[place], labels[place] = window[:-1], window[1:]
    return Batch.of_rows(torch.from_numpy(inputs), torch.from_numpy(labels))


# ----------------------------------------------------------------------------------------- baseline


def unigram_loss(train_tokens: np.ndarray, validation_tokens: np.ndarray, vocab_size: int) -> float:
    """The loss of a model that knows only how frequent each token is, in nats per token.

    Mean negative log-likelihood of the validation tokens under (count + 1) / (tokens + vocab_size),
    counted in training.
    """
    return unigram_loss_of_counts(
        np.bincount(train_tokens), np.bincount(validation_tokens), vocab_size
    )


def unigram_loss_of_counts(train: np.ndarray, validation: np.ndarray, vocab_size: int) -> float:
    """`unigram_loss` from how often each id occurs, int64 [ids]."""
    train, validation = (
        add_counts(train, np.zeros(vocab_size, np.int64)),
        add_counts(validation, np.zeros(vocab_size, np.int64)),
    )
    log_likelihood = np.log((train + 1) / (train.sum() + vocab_size))
    return float(-(validation * log_likelihood).sum() / validation.sum())


def add_counts(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of how often each id occurs, int64 [ids], of two texts; they may be of different
    lengths."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    total = longer.astype(np.int64)
    total[: len(shorter)] += shorter
    return total
