"""The training loop: step, accumulate, clip, log, evaluate, save. It knows neither Ray nor Hydra
nor files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from tp_trainer.batch import Batch
from tp_trainer.config import Config, Train, Unrecoverable, architecture
from tp_trainer.data import Cursor, DataStream
from tp_trainer.messages import Evaluated, StepLogged, StepSkipped
from tp_trainer.metrics import flops_per_token, mfu, peak_flops, peak_memory_gib
from tp_trainer.models.model import ParallelModel
from tp_trainer.optim import AdamW, Guard, GuardMemory, Schedule, learning_rate, set_learning_rate
from tp_trainer.parallel.agreement import LEAVE, STOP, Agreement
from tp_trainer.parallel.drift import check_replicas
from tp_trainer.parallel.gradients import clip_divisor, global_norm
from tp_trainer.parallel.mesh import Mesh


@dataclass
class Position:
    """How far a run has come: what a resume needs besides the tensors."""

    step: int = 0  # optimizer steps done
    cursor: Cursor = field(default_factory=Cursor)
    tokens: int = 0  # label tokens trained on
    guard: GuardMemory = field(default_factory=GuardMemory)  # optim.Guard's memory, at a save
    # at a save and at a resume; None: a new one, as the config says
    schedule: Schedule | None = None


class Diverged(Unrecoverable):
    """As many steps in a row as `train.max_skipped_steps` had to be skipped."""


@dataclass(frozen=True)
class Hooks:
    """What the loop asks of the outside. Every rank calls every hook, in the same order."""

    log: Callable[[StepLogged | Evaluated | StepSkipped], None]  # a row of metrics.jsonl
    stepped: Callable[[int], None]  # a step is done
    # write a checkpoint; the last validation loss; whether to wait until it counts
    save: Callable[[Position, float | None, bool], None]
    # SAVE, STOP, LEAVE: what this rank knows of; asked once a step
    wishes: Callable[[], int] = lambda: 0


@dataclass
class Outcome:
    loss: float | None
    validation_loss: float | None
    position: Position
    training_seconds: float
    tokens_trained: int  # by this start of the program
    skipped_steps: int
    ended: Literal["finished", "stopped", "left"]  # at its end, by a wish of STOP or of LEAVE


def train(
    config: Config,
    model: ParallelModel,
    optimizer: AdamW,
    data: DataStream,
    mesh: Mesh,
    start: Position,
    hooks: Hooks,
) -> Outcome:
    """Train from `start` to the end of the run. The first and the last step are logged, the last is
    evaluated and saved.

    A wish of any rank is fulfilled by all of them after the step in which it was uttered; one to
    end the run ends it there, saved but not evaluated.

    Raises:
        Drifted: parameters that are replicated over tp differ.
        Diverged: too many steps in a row were skipped.
    """
    train, interval = config.train, config.checkpoint.interval
    schedule = start.schedule or Schedule.of(config.optim, data.total_steps(train))
    total, peak_lr = schedule.total, config.optim.lr
    position, loss_value, validation_loss = start, None, None
    agreement, guard = Agreement(), Guard(train, mesh.device, start.guard)
    pace = Pace(config, model, mesh.device, start)
    ended: Literal["finished", "stopped", "left"] = "finished"
    for step in range(start.step + 1, total + 1):
        agreement.ask(hooks.wishes())
        batches, cursor = data.step(position.cursor)
        lr = learning_rate(schedule, peak_lr, step - 1)
        set_learning_rate(optimizer, lr)
        loss, norm = train_step(model, optimizer, batches, mesh, train.clip_grad_norm, guard)
        position = Position(step, cursor, position.tokens + global_tokens(config, data))
        hooks.stepped(step)
        wishes, last = agreement.answer(), step == total
        if not last and wishes & (STOP | LEAVE):
            ended = "stopped" if wishes & STOP else "left"
        saves = bool(wishes) or last or (isinstance(interval, int) and step % interval == 0)
        report_skipped(guard.seen(step, at_once=saves), train, hooks)
        if train.drift_interval and (last or step % train.drift_interval == 0):
            check_replicas(model.named_parameters(), mesh, step)
        if step % train.log_interval == 0 or step == start.step + 1 or last:
            loss_value = finite(loss)  # waits for the device
            hooks.log(pace.row(position, loss_value, finite(norm), lr))
        with pace.paused():
            if last or (train.eval_interval and step % train.eval_interval == 0):
                validation_loss = evaluate(model, data.evaluation(), mesh)
                hooks.log(Evaluated(step, validation_loss))
            if saves:
                saved = replace(position, guard=guard.memory(), schedule=schedule)
                hooks.save(saved, validation_loss, last or ended != "finished")
        if ended != "finished":
            break
    # a resume at or past the end: no step was left
    if validation_loss is None and ended == "finished":
        validation_loss = evaluate(model, data.evaluation(), mesh)
    seconds, tokens = time.perf_counter() - pace.began, position.tokens - start.tokens
    return Outcome(loss_value, validation_loss, position, seconds, tokens, guard.skipped, ended)


class Pace:
    """Seconds and tokens since the row before; evaluating and saving is not training."""

    def __init__(
        self, config: Config, model: ParallelModel, device: torch.device, start: Position
    ) -> None:
        self.device, self.peak = device, peak_flops(device)
        self.flops = flops_per_token(
            model.matmul_weights, architecture(config), config.data.seq_length
        )
        self.world = config.parallelism.world_size
        self.began = self.marked = time.perf_counter()
        self.step, self.tokens = start.step, start.tokens

    def row(
        self, position: Position, loss: float | None, norm: float | None, lr: float
    ) -> StepLogged:
        """The row of metrics.jsonl of this step."""
        now, step, tokens = time.perf_counter(), position.step, position.tokens
        seconds, steps = now - self.marked, step - self.step
        rate = (tokens - self.tokens) / seconds
        each = rate / self.world
        self.marked, self.step, self.tokens = now, step, tokens
        return StepLogged(
            step=step,
            epoch=position.cursor.epoch,
            tokens=tokens,
            loss=loss,
            grad_norm=norm,
            lr=lr,
            tokens_per_second=rate,
            tokens_per_second_per_worker=each,
            mfu=mfu(each, self.flops, self.peak),
            memory_gib=peak_memory_gib(self.device),
            step_seconds=seconds / steps,
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in here doesn't count."""
        began = time.perf_counter()
        yield
        self.marked += time.perf_counter() - began


def report_skipped(skipped: list[tuple[int, int, int]], train: Train, hooks: Hooks) -> None:
    """Log the steps that were skipped; end the run where they are too many in a row."""
    for step, count, in_a_row in skipped:
        hooks.log(StepSkipped(step, count))
        if train.max_skipped_steps is not None and in_a_row >= train.max_skipped_steps:
            raise Diverged(
                f"step {step}: loss or gradient norm is no number (or a spike), {in_a_row} steps in"
                " a row; give a lower optim.lr or more optim.warmup_steps, or resume from an"
                " earlier checkpoint"
            )


def finite(value: torch.Tensor) -> float | None:
    """A number for the log; None for what is none."""
    number = value.item()
    return number if math.isfinite(number) else None


def global_tokens(config: Config, data: DataStream) -> int:
    """Tokens of one global batch: rows are packed, every position counts."""
    return data.order.global_batch_size * config.data.seq_length


def train_step(
    model: ParallelModel,
    optimizer: AdamW,
    batches: list[Batch],
    mesh: Mesh,
    clip_grad_norm: float | None,
    guard: Guard | None = None,
    before_clipping: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over this rank's micro-batches.

    The loss is the mean over all label tokens of the global batch, however they lie on ranks and
    micro-batches.

    Args:
        guard: decides whether the step counts; where it doesn't, parameters and optimizer state
            stay as they are.
        before_clipping: called once every gradient is whole (summed over tp, reduced over dp).

    Returns:
        (loss, global gradient norm before clipping), float32 scalars on the device, the same on all
        ranks.
    """
    # filled in on the device: a copy from here would wait for the step before
    labels = float(sum(batch.count_labels() for batch in batches))
    count = torch.full((), labels, device=mesh.device)
    mesh.data.all_reduce(count)
    total = model.forward_backward(batches, count)
    mesh.data.all_reduce(total)
    norm = global_norm(model.parameters, mesh, total)
    before_clipping()
    optimizer.grad_scale = (
        clip_divisor(norm, clip_grad_norm) if clip_grad_norm is not None else None
    )
    optimizer.found_inf = guard.judge(total, norm) if guard is not None else None
    optimizer.step()
    model.changed(copies_too=optimizer.wrote_copies)
    optimizer.zero_grad(set_to_none=True)
    return total, norm


@torch.no_grad()
def evaluate(model: ParallelModel, batches: Iterator[Batch], mesh: Mesh) -> float:
    """The mean loss per label token over the validation rows of all ranks."""
    dtype = torch.float64 if mesh.device.type == "cpu" else torch.float32
    sums = torch.zeros(2, dtype=dtype, device=mesh.device)
    for batch in batches:
        sums[0] += model.loss(batch)
        sums[1] += batch.count_labels()
    mesh.data.all_reduce(sums)
    return (sums[0] / sums[1]).item()
