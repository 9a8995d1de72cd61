"""The recipe that every rank runs, from top to bottom. Ray Train has made the process group before
it begins.
"""

from __future__ import annotations

from contextlib import closing
from statistics import mean
from typing import cast

from tp_trainer.checkpoint.owner import owned_by
from tp_trainer.checkpoint.saving import Checkpoints
from tp_trainer.checkpoint.store import VerifiedCheckpoint, check_some_count
from tp_trainer.config import Config, ConfigError, check_same_tokens, check_schedule_length
from tp_trainer.data import Cursor, DataStream
from tp_trainer.loop import Position, train
from tp_trainer.messages import Start, TrainingResult
from tp_trainer.optim import GuardMemory, Schedule, learning_rate
from tp_trainer.recipe import build
from tp_trainer.session import Progress, Rank, Reporter, Watch


def run(config: Config, start: Start, progress: Progress) -> TrainingResult:
    """Train as `config` says.

    Args:
        progress: the driver's actor, which messages are pushed to.

    Raises:
        ConfigError: refused; the same on every rank.
    """
    rank, launch = Rank(config), start.launch
    rank.agree(lambda: rank.check(config, launch))
    run = build(
        config,
        rank,
        tokenizer=start.tokenizer,
        lean=start.lean,
        built=lambda model: rank.push(progress, model.built),
    )
    rank.check_alike(run.data)
    # not before: model and data may have to be downloaded and tokenised
    watch = Watch(config, rank, launch, progress)
    run.model.before_pass = watch.forward
    checkpoints = run.checkpoints(lambda: owned_by(checkpoints.store, launch))
    begin, found, skipped, notices = rank.agree(
        lambda: restore(config, launch, checkpoints, run.data)
    )
    assert begin.schedule is not None
    with (
        closing(run.model),
        Reporter(config, rank, checkpoints, run.data, launch, progress, watch) as reporter,
    ):
        reporter.tell(notices)
        reporter.begin(begin.step, begin.schedule.total, run.model.description)
        outcome = train(config, run.model, run.optimizer, run.data, run.mesh, begin, reporter.hooks)
    watch.off()
    return TrainingResult(
        ended=outcome.ended,
        steps=outcome.position.step,
        tokens=outcome.position.tokens,
        loss=outcome.loss,
        validation_loss=outcome.validation_loss,
        unigram_loss=run.data.unigram_loss,
        skipped_steps=outcome.skipped_steps,
        tokens_per_second=(
            outcome.tokens_trained / outcome.training_seconds if outcome.tokens_trained else None
        ),
        resumed_from=found.step if found else None,
        skipped_checkpoints=skipped,
        checkpoint_pause_seconds=mean(checkpoints.pauses) if checkpoints.pauses else None,
        checkpoint=reporter.last_checkpoint or (found.path if found else None),
    )


def restore(
    config: Config, launch: str, checkpoints: Checkpoints, data: DataStream
) -> tuple[Position, VerifiedCheckpoint | None, list[str], list[str]]:
    """Where to go on: the newest checkpoint of this launch (a restart), else what
    `checkpoint.resume` says, else the start.

    Whatever is taken has been read through and is whole.

    Returns the position, the checkpoint that it comes from (None: from the start), those that were
    passed over, and sentences for the user.

    Raises:
        ConfigError: there are checkpoints and none counts, or it is another run's, or has done more
            steps than are asked for.
    """
    resume = config.checkpoint.resume
    found, skipped = checkpoints.newest(launch if resume != "auto" else None)
    if found is None and resume not in ("auto", "never"):
        pinned = checkpoints.pinned(resume)
        if isinstance(pinned, str):
            raise ConfigError("checkpoint.resume", resume, pinned)
        found = pinned
    if found is None:
        check_some_count(checkpoints.store, resume, skipped)
        schedule = Schedule.of(config.optim, data.total_steps(config.train))
        check_schedule_length(config.optim, schedule.total)
        return Position(schedule=schedule), None, skipped, []
    check_same_tokens(config, data.train.identity, found.state.data, found.path)
    state = found.state
    cursor, guard = Cursor(state.epoch, state.offset), cast(GuardMemory, dict(state.guard))
    other = _other_rows(config, data, found)
    if other:
        cursor = Cursor()
        guard.pop("recent", None)  # its losses are no measure of these rows'
    total = data.total_steps(config.train, found.step, cursor)
    schedule, said = resumed_schedule(config, found, total)
    checkpoints.restore(found)
    position = Position(found.step, cursor, state.tokens, guard, schedule)
    notices = [f"passed over: {each}" for each in skipped]
    return position, found, skipped, [*notices, *filter(None, (other, said))]


def _other_rows(config: Config, data: DataStream, found: VerifiedCheckpoint) -> str | None:
    """A sentence where the rows are not those that the checkpoint's position counts: these start
    with the first, whatever has been done of the others.
    """
    state, length = found.state, config.data.seq_length
    if state.data not in (None, data.train.identity):
        what = "other tokens"
    elif state.seq_length not in (None, length):
        what = f"rows of {length} tokens, not {state.seq_length},"
    else:
        return None
    return (
        f"data: {what} than {found.path} was trained on, taken from their first row; steps count on"
        f" from {found.step}, epochs anew"
    )


def resumed_schedule(
    config: Config, found: VerifiedCheckpoint, total: int
) -> tuple[Schedule, str | None]:
    """The schedule of a run that goes on from a checkpoint to `total` steps.

    And a sentence for the user where it isn't the one that the run had.

    Raises:
        ConfigError: the run has done more steps than that, or its warm-up takes more.
    """
    optim, train, peak = config.optim, config.train, config.optim.lr
    if total < found.step:
        key = "num_epochs" if train.max_steps is None else "max_steps"
        done = f"the run is at step {found.step} already, in epoch {found.state.epoch + 1}"
        hint = "give more, or another experiment_name"
        raise ConfigError(f"train.{key}", getattr(train, key), f"{done}; {hint}")
    check_schedule_length(optim, total)
    before = Schedule.stored(found.state.schedule)
    after = before.resumed(optim, found.step, total) if before else Schedule.of(optim, total)
    if after == before or found.step >= total:
        return after, None
    whole = f"it is that of a run of {total} steps from its start"
    if before is None:
        why = f"{found.name} holds none, so {whole}"
    elif before.differs(optim):
        why = f"optim has changed, so {whole}"
    else:
        why = f"the run was to have {before.total} steps and now has {total}"
    line = f"schedule: {why}: {after.describe(peak, found.step)}"
    if learning_rate(after, peak, found.step) == 0 and peak > 0:
        return after, f"warning: {line}; at a rate of 0 nothing is learned"
    return after, line
