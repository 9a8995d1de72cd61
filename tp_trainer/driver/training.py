"""A training run as the user sees it: start, live view, end, summary.json."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from tp_trainer.checkpoint.owner import Owner
from tp_trainer.checkpoint.store import Store, VerifiedCheckpoint, step_name
from tp_trainer.closing import summary_lines
from tp_trainer.config import RUN_LENGTH, Config, ConfigError, to_yaml
from tp_trainer.driver.ending import Ending
from tp_trainer.driver.errors import RunFailed, failure, is_permanent, ran_out, reason
from tp_trainer.driver.monitor import RunMonitor
from tp_trainer.driver.preflight import finished, prepare, set_aside, to_record
from tp_trainer.driver.ray_cluster import check_capacity, environment_of, started
from tp_trainer.driver.signals import Signals
from tp_trainer.driver.workers import LEANER, Group, fit
from tp_trainer.messages import Start, TrainingResult
from tp_trainer.summary import Summary
from tp_trainer.tracker import Outside
from tp_trainer.view import View
from tp_trainer.watch import stacks_file


def train(config: Config) -> Summary:
    """Run the training that `config` describes to its end. Returns the contents of summary.json.

    Raises:
        ConfigError: refused before the first step.
        RunFailed: the workers failed more often than `cluster.max_failures`.
        KeyboardInterrupt, SystemExit: stopped by Ctrl-C or another signal.
    """
    began = time.time()
    config, tokenizer, notice, store = prepare(config)
    view = View()
    if (done := finished(config, store)) is not None:
        view.say(
            f"{config.experiment_name}: this run has finished; nothing to do "
            "(train longer with train.max_steps or train.num_epochs)"
        )
        view.say(summary_lines(done))
        return done

    if notice:
        view.say(notice)
    ending = Ending(config, store, view, began)

    def before() -> None:
        view.say(f"starting {config.parallelism.world_size} {config.cluster.device} workers")
        if config.checkpoint.resume == "never":
            set_aside(config, store, view)
            ending.cleared = True

    with started(config, store, before, view.say, ending.interrupted) as owner:
        tracker = Outside(config, environment_of(config.cluster), view.say)
        try:
            begun = replace(config.checkpoint, resume=to_record(config, store))
            text = to_yaml(replace(config, checkpoint=begun))
            summary = _fit(tokenizer, owner, tracker, ending, text)
        finally:
            tracker.leave()
            view.close()
    view.say(summary_lines(summary))
    return summary


def _fit(tokenizer: str, owner: Owner, tracker: Outside, ending: Ending, text: str) -> Summary:
    """Train on the workers, restart them where they fail, show what they say, write summary.json.

    And config.yaml (`text`). Beside checkpoints it says what they are: as long as the workers may
    refuse, the one that is there stays.
    """
    config, store, signals = ending.config, ending.store, Signals()
    monitor = ending.monitor = RunMonitor(config, ending.view, tracker)
    monitor.at_begin = lambda: store.write_text("config.yaml", text)
    if ending.newest() is None:
        monitor.at_begin()
    with signals.heard():
        try:
            start = Start(owner.launch, tokenizer)
            end = _through_failures(config, start, owner, store, monitor, signals)
        except ConfigError:
            ending.early("refused")
            raise
    finished = end.result is not None and end.result.ended == "finished"
    status: Literal["finished", "stopped", "failed"] = "finished"
    if end.failed:
        status = "failed"
    elif signals.asked and not finished:
        status = "stopped"
    summary = _summary(status, end.result, monitor, ending)
    if not owner.lost.is_set():
        if status != "finished":
            place = ending.place()
            summary["resume_command"] = place.resume_command
            summary["steps"] = summary["steps"] or place.steps
            summary["checkpoint"] = summary["checkpoint"] or place.checkpoint
        _record(summary, store, tracker, end.failed)
    if status != "finished":
        ending.told = True
        ending.view.close()
        ending.view.say(summary_lines(summary))
    if end.failed:
        raise RunFailed(end.failed)
    if status == "stopped":
        assert signals.asked is not None
        signals.end(signals.asked)
    return summary


def _record(summary: Summary, store: Store, tracker: Outside, failed: str | None) -> None:
    """summary.json, and the tracker's end, which it then has as well. Raises RunFailed where it
    can't be written."""
    try:
        store.write_json("summary.json", summary)  # first: the tracker may take its time
        summary["tracker_error"] = tracker.finish(summary)
        if summary["tracker_error"] is not None:
            store.write_json("summary.json", summary)
    except Exception as error:  # every storage has its own
        if not failed:
            raise RunFailed(
                f"the run has ended ({summary['status']}), but its summary.json "
                f"can't be written: {error}"
            ) from error


def _summary(
    status: str, result: TrainingResult | None, monitor: RunMonitor, ending: Ending
) -> Summary:
    """The contents of summary.json, from rank 0's last answer and what the driver has seen."""
    config, store, began = ending.config, ending.store, ending.began
    missing = monitor.saves.missing(
        lambda step: isinstance(store.check(step_name(step)), VerifiedCheckpoint)
    )
    logged = monitor.logged
    summary: dict[str, Any] = {
        "status": status,
        "steps": monitor.step,
        "tokens": logged.tokens if logged else 0,
        "loss": logged.loss if logged else None,
        "validation_loss": monitor.validation_loss,
        "unigram_loss": None,
        "wall_seconds": time.time() - began,
        "startup_seconds": (monitor.begun or time.time()) - began,
        "tokens_per_second": None,
        "restarts": 0,
        "resumed_from": None,
        "skipped_checkpoints": [],
        "checkpoint": None,
        "world": config.parallelism.world_size,
        "mesh": {"dp": config.parallelism.dp, "tp": config.parallelism.tp},
        "skipped_steps": 0,
        "failed_saves": len(missing),
    }
    if config.parallelism.dp_replicate > 1:
        summary["mesh"]["dp_replicate"] = config.parallelism.dp_replicate
    if result is not None:  # rank 0 knows better
        summary |= {key: value for key, value in asdict(result).items() if key != "ended"}
    summary |= asdict(monitor.costs(began))
    summary |= {
        "missing_checkpoints": [f"step {step}: {why}" for step, why in missing.items()],
        "model": monitor.model,
        "data": monitor.data,
        "fast_paths": {name: asdict(path) for name, path in monitor.fast_paths.items()},
        "tracker_error": None,
        "run_dir": config.run_dir,
        "device": config.cluster.device,
        "random_data": config.data.source == "random",
        "tracker": config.tracker.kind,
        "run_length": {name: getattr(config.train, name) for name in RUN_LENGTH},
    }
    return cast(Summary, summary)


@dataclass(frozen=True)
class End:
    """How the workers' run has ended: rank 0's last answer, and one line where it failed."""

    result: TrainingResult | None
    failed: str | None = None


def _through_failures(
    config: Config,
    start: Start,
    owner: Owner,
    store: Store,
    monitor: RunMonitor,
    signals: Signals,
) -> End:
    """The workers' run to its end, with as many restarts as it takes and may take."""
    stopping = Stopping(config, monitor, signals)
    result: TrainingResult | None
    while True:
        error, result = fit(
            config,
            "tp_trainer.worker:run",
            replace(start, restarts=monitor.restarts),
            store,
            monitor.take,
            lambda group: _tick(group, owner, stopping),
        )
        hung, training = monitor.hung, monitor.training
        monitor.ended()
        if owner.lost.is_set():
            taken = "has been taken over by another process; this one has ended its workers"
            return End(None, f"{config.run_dir} {taken}")
        if error is not None and ran_out(error) and monitor.leaner and not start.lean:
            start = replace(start, lean=True)
            monitor.say(LEANER)
            continue
        if error is not None:
            line, why = failure(error, store), reason(error)
            if hung:
                line = why = _hung(config, start.launch, monitor)
            monitor.failed(why)
            if signals.asked:
                monitor.say(f"failed while it was to stop: {line}")
                return End(result)
            if is_permanent(error):
                return End(result, f"{line}; a restart would come to the same")
            if monitor.in_a_row > config.cluster.max_failures:
                return End(result, _gave_up(monitor, line, training))
            monitor.say(line if hung else f"failed after step {monitor.step}: {why}")
        elif result is not None and result.ended == "left":
            monitor.restarting()
            monitor.say(
                f"a worker was told to end: saved at step {monitor.step}, the workers restart"
            )
        else:
            unasked = result is not None and result.ended == "stopped" and not signals.asked
            return End(result, "rank 0 stopped, and nobody had asked it to" if unasked else None)
        if (refused := _no_room(config)) is not None:
            before = f"they had failed: {monitor.failures[-1]}"
            return End(result, f"the workers can't be restarted: {refused}; {before}")
        monitor.restarts += 1


def _hung(config: Config, launch: str, monitor: RunMonitor) -> str:
    places = stacks_file(config.run_dir, launch, "*")
    return (
        f"hung at step {monitor.furthest}: no sign of life for {config.cluster.hang_seconds:g} s,"
        f" each rank's stack: {places or 'at the end of its log, in the logs of Ray'}"
    )


def _gave_up(monitor: RunMonitor, line: str, trained: bool) -> str:
    times = monitor.in_a_row
    if times == 1:
        return line
    return (
        f"{f'step {monitor.furthest + 1}' if trained else 'the start of the workers'} failed"
        f" {times} times in a row: {line}"
    )


def _no_room(config: Config) -> ConfigError | None:
    """Why the cluster can't take the workers any more; None where it can."""
    try:
        check_capacity(config)
    except ConfigError as refused:
        return refused
    return None


def _tick(group: Group, owner: Owner, stopping: Stopping) -> None:
    """Now and then, while the workers run."""
    stopping.watch(group)
    stopping.monitor.watch(group)
    if owner.lost.is_set():
        group.kill()


class Stopping:
    """A stop that was asked for, until it comes about or has taken too long."""

    def __init__(self, config: Config, monitor: RunMonitor, signals: Signals) -> None:
        self.seconds, self.monitor, self.signals = config.cluster.stop_seconds, monitor, signals
        self.since: float | None = None
        signals.patient = lambda: monitor.training  # before that there is nothing to save

    def watch(self, group: Group) -> None:
        self.signals.look()
        if self.signals.asked is None:
            return
        if self.since is None:
            self.since = time.monotonic()
            group.stop()
            self.monitor.say("stopping: saving, again to end at once")
        quiet = time.monotonic() - max(self.since, self.monitor.sign)
        if quiet > self.seconds and not self.monitor.saving:
            self.monitor.say(
                f"no sign of life for {self.seconds:g} s (cluster.stop_seconds): ending unsaved"
            )
            self.signals.end(self.signals.asked)
