"""Data: documents become rows of tokens, and the order says which of them each data-parallel rank
sees at each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tp_trainer.config import Config, ConfigError, Train, architecture
from tp_trainer.config.resolved import ResolvedData
from tp_trainer.data.order import Cursor, Order, evaluation_batches, micro_batches
from tp_trainer.data.rows import RandomRows, Rows, unigram_loss_of_counts
from tp_trainer.data.sources import NAMED, Part, Source
from tp_trainer.data.tokens import prepare
from tp_trainer.messages import DataFound

if TYPE_CHECKING:
    from tp_trainer.batch import Batch

__all__ = ["Cursor", "DataStream", "Order", "RandomRows", "Rows", "open_data"]

RANDOM_VALIDATION_ROWS = 64
PARTS: tuple[Part, Part] = ("train", "validation")


class TokenFiles(NamedTuple):
    """The directories of both parts, and what lies where they were made of."""

    train: Path
    validation: Path
    found: DataFound


@dataclass
class DataStream:
    """The data of a run as one data-parallel rank sees it."""

    train: Rows | RandomRows
    validation: Rows | RandomRows
    order: Order
    unigram_loss: float | None  # nats per token; None for random tokens
    dp_rank: int
    dp_size: int
    micro_batch_size: int
    eval_batches: int | None
    found: DataFound  # for summary.json

    def step(self, cursor: Cursor) -> tuple[list[Batch], Cursor]:
        """This rank's micro-batches of the optimizer step at `cursor`, and the cursor of the next
        one.

        Each is on the CPU, [micro_batch_size, seq_length].
        """
        indices, after = self.order.next(cursor)
        parts = micro_batches(indices, self.dp_rank, self.dp_size, self.micro_batch_size)
        return [self.train.batch(part.tolist()) for part in parts], after

    def evaluation(self) -> Iterator[Batch]:
        """This rank's micro-batches of one evaluation, as many on every rank; some may hold no
        label that counts."""
        rows = (
            len(self.validation)
            if self.eval_batches is None
            else self.eval_batches * self.order.global_batch_size
        )
        for part in evaluation_batches(
            min(rows, len(self.validation)), self.dp_rank, self.dp_size, self.micro_batch_size
        ):
            yield self.validation.batch(part)

    def total_steps(self, train: Train, step: int = 0, cursor: Cursor | None = None) -> int:
        """The length of the run in optimizer steps.

        Args:
            step: those done already, by which `cursor` was reached; with epochs of whatever length.
        """
        if train.max_steps is not None:
            return train.max_steps
        return step + self.order.steps_until(train.num_epochs, cursor or Cursor())


def open_data(
    config: Config,
    *,
    tokenizer: str,
    dp_rank: int,
    dp_size: int,
    first_on_node: Callable[[Callable[[], TokenFiles]], TokenFiles],
) -> DataStream:
    """The data of a run. `tokenizer` is what `choose_tokenizer` gave; `first_on_node(fn)` runs fn
    on one rank of each node before the others, so that one of them tokenises.

    Raises:
        ConfigError: the source, the tokenizer or the sizes don't do. Every rank raises the same.
    """
    data, train, vocab_size = config.data, config.train, architecture(config).vocab_size
    training: Rows | RandomRows
    validation: Rows | RandomRows
    if data.source == "random":
        seed, baseline, found = config.seed, None, DataFound(source="random")
        training = RandomRows(vocab_size, data.seq_length, seed)
        validation = RandomRows(vocab_size, data.seq_length, seed + 1, RANDOM_VALIDATION_ROWS)
    else:
        files = first_on_node(lambda: _token_files(config, tokenizer, vocab_size))
        training = Rows(files.train, data.seq_length)
        validation = Rows(files.validation, data.seq_length)
        _check_a_row(data, validation)
        found = files.found
        found |= {"tokenizer": tokenizer, "revision": training.meta["revision"]}
        found |= {"train": training.facts(), "validation": validation.facts()}
        baseline = unigram_loss_of_counts(training.counts, validation.counts, vocab_size)
    order = Order(
        len(training),
        train.global_batch_size or train.micro_batch_size * dp_size,
        config.seed,
        data.shuffle,
        train.max_steps_per_epoch,
    )
    return DataStream(
        training,
        validation,
        order,
        baseline,
        dp_rank,
        dp_size,
        train.micro_batch_size,
        train.eval_batches,
        found,
    )


def _token_files(config: Config, tokenizer: str, vocab_size: int) -> TokenFiles:
    """Both parts as tokens: those that an earlier run has left, else made now."""
    source = Source(config.data)
    train, validation = (
        prepare(config.data, tokenizer, vocab_size, part, config.model.trust_remote_code, source)
        for part in PARTS
    )
    ignored = source.listing.ignored
    found = DataFound(
        source=config.data.source,
        name=source.data.name,
        files=len(source.files()) or None,
        files_ignored=len(ignored),
        first_ignored=ignored[:NAMED],
    )
    return TokenFiles(train, validation, found)


def _check_a_row(data: ResolvedData, validation: Rows) -> None:
    if not len(validation):
        raise ConfigError(
            "data.seq_length",
            data.seq_length,
            f"the validation part has only {len(validation.tokens):,} tokens, less than one "
            f"row; give at most {len(validation.tokens) - 1}, or hold out more "
            "(data.validation_percentage, data.validation_split)",
        )
