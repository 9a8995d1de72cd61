"""The global order: a function of (seed, epoch). A cursor says how far it was read; ranks take
slices of it.

Nothing here depends on how many ranks there are until `rank_slice`, so a run goes on with the same
global batches in another layout.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tp_trainer.config import ConfigError


@dataclass(frozen=True)
class Cursor:
    """How far the order was read: what a checkpoint keeps of the data."""

    epoch: int = 0
    offset: int = 0  # sequences consumed in this epoch, by all ranks


class Order:
    """Which rows go to which step. The tail of each epoch that doesn't fill a global batch is
    dropped.
    """

    def __init__(
        self,
        rows: int,
        global_batch_size: int,
        seed: int,
        shuffle: bool,
        max_steps_per_epoch: int | None = None,
    ) -> None:
        if rows < global_batch_size:
            enough = (
                f"give at most {rows}, a smaller data.seq_length or more data"
                if rows
                else "give a smaller data.seq_length or more data"
            )
            raise ConfigError(
                "train.global_batch_size",
                global_batch_size,
                f"the training data has only {rows} rows; {enough}",
            )
        self.rows, self.global_batch_size, self.seed, self.shuffle = (
            rows,
            global_batch_size,
            seed,
            shuffle,
        )
        self.steps_per_epoch = min(rows // global_batch_size, max_steps_per_epoch or rows)
        # With a cursor from before a change of the batch size, offsets aren't whole steps: count
        # sequences.
        self._usable = (
            rows if max_steps_per_epoch is None else self.steps_per_epoch * global_batch_size
        )
        self._cached: tuple[int, np.ndarray] | None = None

    def epoch(self, epoch: int) -> np.ndarray:
        """int64 [rows]: the order of one epoch."""
        if self._cached is None or self._cached[0] != epoch:
            generator = np.random.Generator(
                np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
            )
            self._cached = (
                epoch,
                generator.permutation(self.rows) if self.shuffle else np.arange(self.rows),
            )
        return self._cached[1]

    def steps_until(self, epochs: int, cursor: Cursor) -> int:
        """How many global batches lie between a cursor and the end of so many epochs.

        Below 0 where the cursor is past that.
        """
        left = max(0, self._usable - cursor.offset) // self.global_batch_size
        return left + (epochs - cursor.epoch - 1) * self.steps_per_epoch

    def next(self, cursor: Cursor) -> tuple[np.ndarray, Cursor]:
        """The next global batch, int64 [global_batch_size] row indices, and the cursor after it."""
        epoch, offset = cursor.epoch, cursor.offset
        if offset + self.global_batch_size > self._usable:
            epoch, offset = epoch + 1, 0
        end = offset + self.global_batch_size
        return self.epoch(epoch)[offset:end], Cursor(epoch, end)


def rank_slice(indices: np.ndarray, dp_rank: int, dp_size: int) -> np.ndarray:
    """The part of a global batch that one data-parallel rank computes."""
    return indices[dp_rank::dp_size]


def micro_batches(
    indices: np.ndarray, dp_rank: int, dp_size: int, micro_batch_size: int
) -> list[np.ndarray]:
    """One rank's part of a global batch as micro-batches of equal size."""
    assert len(indices) % (dp_size * micro_batch_size) == 0, (
        "config.check_global_batch lets no other size through"
    )
    mine = rank_slice(indices, dp_rank, dp_size)
    return [
        mine[start : start + micro_batch_size] for start in range(0, len(mine), micro_batch_size)
    ]


def evaluation_batches(
    rows: int, dp_rank: int, dp_size: int, micro_batch_size: int
) -> list[list[int]]:
    """One rank's micro-batches of an evaluation of `rows` rows: as many and as large on every rank,
    filled up with index -1.
    """
    across = dp_size * micro_batch_size
    mine = [
        index if index < rows else -1
        for index in range(-(-rows // across) * across)[dp_rank::dp_size]
    ]
    return [
        mine[start : start + micro_batch_size] for start in range(0, len(mine), micro_batch_size)
    ]
