"""Data: documents become rows of tokens, and the order says which of them each data-parallel rank sees at each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tp_trainer.config import Config, ConfigError, Train, architecture
from tp_trainer.data.order import Cursor, Order, evaluation_batches, micro_batches
from tp_trainer.data.tokens import IGNORE_INDEX, RandomRows, Rows, prepare, unigram_loss_of_counts

if TYPE_CHECKING:
    import torch

__all__ = ["IGNORE_INDEX", "Cursor", "DataStream", "Order", "RandomRows", "Rows", "open_data"]

RANDOM_VALIDATION_ROWS = 64

TokenFiles = tuple[Path, Path]  # of the training and of the validation part


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

    def step(self, cursor: Cursor) -> tuple[list[dict[str, torch.Tensor]], Cursor]:
        """This rank's micro-batches of the optimizer step at `cursor`, and the cursor of the next one.

        Each is a dict of CPU tensors input_ids and labels, int64 [micro_batch_size, seq_length]; labels are shifted already.
        """
        indices, after = self.order.next(cursor)
        parts = micro_batches(indices, self.dp_rank, self.dp_size, self.micro_batch_size)
        return [self.train.batch(part.tolist()) for part in parts], after

    def evaluation(self) -> Iterator[dict[str, torch.Tensor]]:
        """This rank's micro-batches of one evaluation, as many on every rank; some may hold no label that counts."""
        rows = len(self.validation) if self.eval_batches is None else self.eval_batches * self.order.global_batch_size
        for part in evaluation_batches(min(rows, len(self.validation)), self.dp_rank, self.dp_size, self.micro_batch_size):
            yield self.validation.batch(part)

    def total_steps(self, train: Train) -> int:
        """The length of the run in optimizer steps."""
        return train.max_steps if train.max_steps is not None else train.num_epochs * self.order.steps_per_epoch


def open_data(
    config: Config, *, tokenizer: str, dp_rank: int, dp_size: int, first_on_node: Callable[[Callable[[], TokenFiles]], TokenFiles]
) -> DataStream:
    """The data of a run. `tokenizer` is what `choose_tokenizer` gave; `first_on_node(fn)` runs fn on one rank of each
    node before the others, so that one of them tokenises.

    Raises:
        ConfigError: the source, the tokenizer or the sizes don't do. Every rank raises the same.
    """
    data, train, vocab_size = config.data, config.train, architecture(config).vocab_size
    assert data.seq_length is not None, "config.resolve fills it in"
    training: Rows | RandomRows
    validation: Rows | RandomRows
    if data.source == "random":
        training = RandomRows(vocab_size, data.seq_length, config.seed)
        validation = RandomRows(vocab_size, data.seq_length, config.seed + 1, RANDOM_VALIDATION_ROWS)
        baseline = None
    else:

        def make() -> TokenFiles:
            trust = config.model.trust_remote_code
            return prepare(data, tokenizer, vocab_size, "train", trust), prepare(data, tokenizer, vocab_size, "validation", trust)

        training, validation = (Rows(directory, data.seq_length) for directory in first_on_node(make))
        if not len(validation):
            raise ConfigError(
                "data.seq_length", data.seq_length,
                f"the validation part has only {len(validation.tokens):,} tokens, less than one row; "
                f"give at most {len(validation.tokens) - 1}, or hold out more (data.validation_percentage, data.validation_split)",
            )  # fmt: skip
        baseline = unigram_loss_of_counts(training.counts, validation.counts, vocab_size)
    order = Order(
        len(training), train.global_batch_size or train.micro_batch_size * dp_size, config.seed, data.shuffle, train.max_steps_per_epoch
    )
    return DataStream(training, validation, order, baseline, dp_rank, dp_size, train.micro_batch_size, train.eval_batches)
