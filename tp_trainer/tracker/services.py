"""The services that a tracker may be, each behind the same small interface: TensorBoard, W&B,
MLflow.

They run in a process of their own (tracker/process.py): what one raises, or never answers, is no
harm to a training.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypedDict

from tp_trainer.config import Config, ConfigError, plain
from tp_trainer.summary import Summary
from tp_trainer.tracker.folder import Folder

Row = Mapping[str, float | int | None]


class Request(TypedDict, total=False):
    """What the tracker's process is asked for: one of these, and of a row its step."""

    start: dict[str, Any]  # the config as plain values: open the service
    log: Row
    step: int
    flush: bool
    summary: Summary
    close: bool


PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
"""tracker.kind -> the package that it needs."""


class Tracker(Protocol):
    """Takes rows of numbers, each belonging to a step. Any method may raise what it likes, and take
    its time."""

    def log(self, row: Row, step: int) -> None:
        """Record one row; None and NaN mean that there is no such number."""

    def flush(self) -> None:
        """Bring what was logged to where it outlives this machine. Called at checkpoints."""

    def summary(self, values: Summary) -> None:
        """Record the contents of summary.json, once, at the end of the run."""

    def close(self) -> None:
        """Flush and let go. Nothing is logged after it."""


def check_tracker(config: Config) -> None:
    """Raises ConfigError where the chosen tracker's package isn't installed. Imports nothing: made
    for the driver."""
    package = PACKAGES.get(config.tracker.kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            "tracker",
            config.tracker.kind,
            f"needs a package that is not installed; pip install {package}, or tracker=none",
        )


def build_tracker(config: Config, run_dir: str) -> Tracker | None:
    """The configured tracker, or None for tracker=none. A run that goes on after a resume goes on
    in it."""
    kinds: dict[str, Callable[[Config, str], Tracker]]
    kinds = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
    build = kinds.get(config.tracker.kind)
    return None if build is None else build(config, run_dir)


class TensorBoard:
    """Event files in <run_dir>/tensorboard, one scalar per number, under the names of
    metrics.jsonl."""

    def __init__(self, config: Config, run_dir: str) -> None:
        from tensorboardX import SummaryWriter

        self.folder = Folder(run_dir, "tensorboard")
        # files are named by the second: another one's of the same second must stay
        self.writer = SummaryWriter(
            str(self.folder.local), filename_suffix=f".{uuid.uuid4().hex[:8]}"
        )

    def log(self, row: Row, step: int) -> None:
        for key, value in _numbers(row).items():
            self.writer.add_scalar(key, value, step)

    def flush(self) -> None:
        self.writer.flush()
        self.folder.upload()

    def summary(self, values: Summary) -> None:
        self.writer.add_text("summary", f"```\n{json.dumps(values, indent=2, default=str)}\n```")

    def close(self) -> None:
        self.writer.close()
        self.folder.upload()
        self.folder.remove()


class WandB:
    """One W&B run per experiment name: a resumed run goes on in it. WANDB_MODE and the rest of
    W&B's environment hold."""

    def __init__(self, config: Config, run_dir: str) -> None:
        import wandb

        self.folder = Folder(run_dir, "wandb")
        name = config.experiment_name
        # W&B adds /wandb itself
        directory = str(self.folder.local if self.folder.remote else self.folder.local.parent)
        self.run = wandb.init(
            project=config.tracker.project,
            id=name,
            name=name,
            resume="allow",
            dir=directory,
            config=_public(config),
        )
        # Our own step axis: W&B's only ever grows, and would drop the steps that are done again
        # after a resume.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, row: Row, step: int) -> None:
        self.run.log({**_numbers(row), "step": step})

    def flush(self) -> None:
        """Nothing: W&B sends on its own."""

    def summary(self, values: Summary) -> None:
        self.run.summary.update(values)

    def close(self) -> None:
        self.run.finish()
        self.folder.upload()  # offline runs, which `wandb sync` can send later
        self.folder.remove()


class MLflow:
    """One MLflow run per experiment name, in the MLflow experiment `tracker.project`: a resumed run
    goes on in it."""

    def __init__(self, config: Config, run_dir: str) -> None:
        # the client's own 7 retries of up to 120 s each hold everything for minutes; whoever feeds
        # us tries again
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        import mlflow

        self.mlflow = mlflow
        self.folder = Folder(run_dir, "mlruns") if config.tracker.uri is None else None
        if self.folder is None:
            mlflow.set_tracking_uri(config.tracker.uri)
        else:  # a database file: MLflow 3 refuses plain directories
            if self.folder.remote:
                self.folder.fetch("mlflow.db")
            mlflow.set_tracking_uri(f"sqlite:///{self.folder.local.resolve()}/mlflow.db")
            # artifacts would lie in the working directory
            if mlflow.get_experiment_by_name(config.tracker.project) is None:
                mlflow.create_experiment(
                    config.tracker.project,
                    artifact_location=(self.folder.local / "artifacts").resolve().as_uri(),
                )
        mlflow.set_experiment(config.tracker.project)
        name = config.experiment_name
        known = mlflow.search_runs(
            filter_string=f"tags.tp_trainer = '{name}'", output_format="list", max_results=1
        )
        if known:
            mlflow.start_run(run_id=known[0].info.run_id)
        else:
            mlflow.start_run(run_name=name, tags={"tp_trainer": name})
            # only once: MLflow refuses a parameter's second value
            mlflow.log_params(_flat(_public(config)))

    def log(self, row: Row, step: int) -> None:
        self.mlflow.log_metrics(
            {key: float(value) for key, value in _numbers(row).items()}, step=step
        )

    def flush(self) -> None:
        if self.folder is not None:
            self.folder.upload()

    def summary(self, values: Summary) -> None:
        self.mlflow.log_dict(values, "summary.json")

    def close(self) -> None:
        self.mlflow.end_run()
        if self.folder is not None:
            self.folder.upload()
            self.folder.remove()


def _numbers(row: Row) -> dict[str, float | int]:
    """The row's numbers, its step and what it hasn't left out."""
    return {key: value for key, value in row.items() if value is not None and key != "step"}


def _public(config: Config) -> dict[str, Any]:
    """The configuration without the workers' environment, where keys and tokens travel."""
    values = plain(config)
    del values["cluster"]["env"]
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {prefix + str(key): value}
        )
    return flat
