"""A training run as the user sees it: start, live view, end, summary.json."""

from __future__ import annotations

import time
from typing import Any

from tp_trainer.checkpoint.store import Store
from tp_trainer.config import RUN_LENGTH, Config, to_yaml
from tp_trainer.driver.errors import RunFailed, failure
from tp_trainer.driver.preflight import finished, prepare, set_aside
from tp_trainer.driver.ray_cluster import started
from tp_trainer.driver.workers import fit
from tp_trainer.view import View, summary_lines


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
            summary = _fit(config, tokenizer, owner.launch, began, store, view)
        finally:
            view.close()
    print(summary_lines(summary), flush=True)
    return summary


def _fit(config: Config, tokenizer: str, launch: str, began: float, store: Store, view: View) -> dict[str, Any]:
    """Train on the workers, show what they say, wait for their end, write summary.json."""
    followed, cluster = _Followed(config, view), config.cluster
    error, result = fit(config, "tp_trainer.worker:run", {"launch": launch, "tokenizer": tokenizer}, store, followed.take)
    drifted = (result or {}).get("drifted")
    summary: dict[str, Any] = {
        "status": "failed" if error or drifted else "finished", "steps": followed.step, "tokens": followed.row.get("tokens", 0),
        "loss": followed.row.get("loss"), "validation_loss": followed.validation_loss, "unigram_loss": None,
        "wall_seconds": time.time() - began, "startup_seconds": (followed.begun or time.time()) - began, "tokens_per_second": None,
        "restarts": max(0, followed.starts - 1), "resumed_from": None, "skipped_checkpoints": [], "checkpoint": None, "skipped_steps": 0,
        "world": config.parallelism.world_size, "mesh": {"dp": config.parallelism.dp, "tp": config.parallelism.tp},
    }  # fmt: skip
    if config.parallelism.dp_replicate > 1:
        summary["mesh"]["dp_replicate"] = config.parallelism.dp_replicate
    if result is not None and not drifted:
        summary |= result
    summary |= {
        "run_dir": config.run_dir, "device": cluster.device, "random_data": config.data.source == "random", "tracker": config.tracker.kind,
        "run_length": {name: getattr(config.train, name) for name in RUN_LENGTH},
    }  # fmt: skip
    store.write_json("summary.json", summary)
    if error is not None:
        raise RunFailed(failure(error, store))
    if drifted:
        raise RunFailed(drifted)
    return summary


class _Followed:
    """What the driver has seen of the run."""

    def __init__(self, config: Config, view: View) -> None:
        self.config, self.view = config, view
        self.starts, self.step = 0, 0
        self.row: dict[str, Any] = {}
        self.validation_loss: float | None = None
        self.begun: float | None = None

    def take(self, item: dict[str, Any]) -> None:
        if "begin" in item:
            self.starts += 1
            self.begun = self.begun or time.time()
            self.view.start(item["begin"], self.config, self.config.parallelism.world_size, item["device"])
            if self.starts > 1:
                self.view.update({"event": f"workers restarted: going on from step {item['step']}"})
            elif item["step"]:
                self.view.update({"event": f"resumed from step {item['step']}"})
            return
        self.step = item.get("step", self.step)
        self.validation_loss = item.get("validation_loss", self.validation_loss)
        if "loss" in item:
            self.row = item
        self.view.update(item)
