"""A training run as the user sees it: start, live view, end, summary.json."""

from __future__ import annotations

import time
from typing import Any

from tp_trainer.checkpoint.owner import Owner
from tp_trainer.checkpoint.store import Store
from tp_trainer.config import RUN_LENGTH, Config, ConfigError, to_yaml
from tp_trainer.driver.errors import RunFailed, failure, reason
from tp_trainer.driver.followed import Followed
from tp_trainer.driver.preflight import finished, prepare, set_aside
from tp_trainer.driver.ray_cluster import Signals, check_capacity, started
from tp_trainer.driver.workers import Group, fit
from tp_trainer.tracker import record_summary
from tp_trainer.view import View, summary_lines
from tp_trainer.watch import stacks_file


def train(config: Config) -> dict[str, Any]:
    """Run the training that `config` describes to its end. Returns the contents of summary.json.

    Raises:
        ConfigError: refused before the first step.
        RunFailed: the workers failed more often than `cluster.max_failures`.
        KeyboardInterrupt, SystemExit(143): stopped by Ctrl-C or SIGTERM.
    """
    began = time.time()
    config, tokenizer, notice, store = prepare(config)
    view = View()
    if (done := finished(config, store)) is not None:
        print(f"{config.experiment_name}: this run has finished; nothing to do (train longer with train.max_steps or train.num_epochs)")
        print(summary_lines(done), flush=True)
        return done
    if notice:
        view.update({"event": notice})

    def before() -> None:
        view.update({"event": f"starting {config.parallelism.world_size} {config.cluster.device} workers"})
        if config.checkpoint.resume == "never":
            set_aside(config, store, view)

    with started(config, store, before, lambda text: view.update({"event": text})) as owner:
        store.write_text("config.yaml", to_yaml(config))
        try:
            summary = _fit(config, tokenizer, owner, began, store, view)
        finally:
            view.close()
    print(summary_lines(summary), flush=True)
    return summary


def _fit(config: Config, tokenizer: str, owner: Owner, began: float, store: Store, view: View) -> dict[str, Any]:
    """Train on the workers, restart them where they fail, show what they say, write summary.json."""
    followed, signals, cluster = Followed(config, view), Signals(), config.cluster
    with signals.heard():
        result, failed = _through_failures(config, {"launch": owner.launch, "tokenizer": tokenizer}, owner, store, followed, signals)
    result = result or {}
    failed = failed or result.pop("unrecoverable", None)
    status = "failed" if failed else "stopped" if signals.asked and result.get("ended") != "finished" else "finished"
    result.pop("ended", None)
    summary: dict[str, Any] = {
        "status": status, "steps": followed.step, "tokens": followed.row.get("tokens", 0),
        "loss": followed.row.get("loss"), "validation_loss": followed.validation_loss, "unigram_loss": None,
        "wall_seconds": time.time() - began, "startup_seconds": (followed.begun or time.time()) - began, "tokens_per_second": None,
        "restarts": 0, "resumed_from": None, "skipped_checkpoints": [], "checkpoint": None,
        "world": config.parallelism.world_size, "mesh": {"dp": config.parallelism.dp, "tp": config.parallelism.tp},
        "skipped_steps": 0, "failed_saves": 0,
    }  # fmt: skip
    if config.parallelism.dp_replicate > 1:
        summary["mesh"]["dp_replicate"] = config.parallelism.dp_replicate
    summary |= result
    summary |= followed.costs(began)
    summary |= {
        "run_dir": config.run_dir, "device": cluster.device, "random_data": config.data.source == "random", "tracker": config.tracker.kind,
        "run_length": {name: getattr(config.train, name) for name in RUN_LENGTH},
    }  # fmt: skip
    if not owner.lost.is_set():
        try:
            store.write_json("summary.json", summary)
        except OSError as error:
            if not failed:
                raise RunFailed(f"the run has ended ({status}), but its summary.json can't be written: {error}") from error
        record_summary(config, summary)
    if failed:
        raise RunFailed(failed)
    if status == "stopped":
        assert signals.asked is not None
        view.close()
        print(summary_lines(summary), flush=True)
        signals.end(signals.asked)
    return summary


def _through_failures(
    config: Config, settings: dict[str, Any], owner: Owner, store: Store, followed: Followed, signals: Signals
) -> tuple[dict[str, Any] | None, str | None]:
    """The workers' run to its end, with as many restarts as it takes and may take.

    Returns rank 0's last answer and, where the run failed, one line about it.
    """
    stopping = Stopping(config, followed, signals)
    while True:
        error, result = fit(config, "tp_trainer.worker:run", settings, store, followed.take, lambda group: _tick(group, owner, stopping))
        hung, training = followed.hung, followed.training
        followed.ended()
        if owner.lost.is_set():
            return None, f"{config.run_dir} has been taken over by another process; this one has ended its workers"
        if error is None and (result or {}).get("ended") != "left":
            return result, None
        if error is None:
            followed.restarting()
            followed.say(f"a worker was told to end: saved at step {followed.step}, the workers restart")
        else:
            line = failure(error, store)
            if hung:
                line = f"hung at step {followed.furthest}: no sign of life for {config.cluster.hang_seconds:g} s"
                places = stacks_file(config.run_dir, settings["launch"], "*")
                line += f", each rank's stack: {places or 'at the end of its log, in the logs of Ray'}"
            followed.failed(reason(error) if not hung else line)
            if signals.asked:
                followed.say(f"failed while it was to stop: {line}")
                return result, None
            if followed.in_a_row > config.cluster.max_failures:
                return result, _gave_up(followed, line, training)
            followed.say(line if hung else f"failed after step {followed.step}: {reason(error)}")
        try:
            check_capacity(config)
        except ConfigError as refused:
            return result, f"the workers can't be restarted: {refused}; they had failed: {followed.failures[-1]}"
        followed.restarts += 1


def _gave_up(followed: Followed, line: str, trained: bool) -> str:
    times = followed.in_a_row
    if times == 1:
        return line
    return f"{f'step {followed.furthest + 1}' if trained else 'the start of the workers'} failed {times} times in a row: {line}"


def _tick(group: Group, owner: Owner, stopping: Stopping) -> None:
    """Now and then, while the workers run."""
    stopping.watch(group)
    stopping.followed.watch(group)
    if owner.lost.is_set():
        group.kill()


class Stopping:
    """A stop that was asked for, until it comes about or has taken too long."""

    def __init__(self, config: Config, followed: Followed, signals: Signals) -> None:
        self.seconds, self.followed, self.signals = config.cluster.stop_seconds, followed, signals
        self.since: float | None = None
        signals.patient = lambda: followed.training  # before that there is nothing to save

    def watch(self, group: Group) -> None:
        if self.signals.asked is None:
            return
        if self.since is None:
            self.since = time.monotonic()
            group.stop()
            self.followed.say("stopping: saving, again to end at once")
        quiet = time.monotonic() - max(self.since, self.followed.sign)
        if quiet > self.seconds and not self.followed.saving:
            self.followed.say(f"no sign of life for {self.seconds:g} s (cluster.stop_seconds): ending unsaved")
            self.signals.end(self.signals.asked)
