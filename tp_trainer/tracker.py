"""Where a run's numbers go: metrics.jsonl always, and TensorBoard, W&B or MLflow beside it, behind one small interface.

Only rank 0 has a tracker. metrics.jsonl is part of the run, so its errors end the training like any other; the
other one is somebody's service: when it fails, the run says so once and goes on without it.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from tp_trainer.config import Config, ConfigError, plain

Row = Mapping[str, float | int | None]

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
"""tracker.kind -> the package that it needs."""

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes rows of numbers, each belonging to a step."""

    def log(self, row: Row, step: int) -> None:
        """Record one row; None and NaN mean that there is no such number."""

    def flush(self) -> None:
        """Bring what was logged to where it outlives this machine. Called at checkpoints and evaluations."""

    def close(self) -> None:
        """Flush and let go. Nothing is logged after it."""


def check_tracker(config: Config) -> None:
    """Raises ConfigError where the chosen tracker's package isn't installed. Imports nothing: made for the driver."""
    package = PACKAGES.get(config.tracker.kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError("tracker", config.tracker.kind, f"needs a package that is not installed; pip install {package}, or tracker=none")


def build_tracker(config: Config, run_dir: str) -> Tracker:
    """metrics.jsonl in `run_dir` and the configured tracker. A run that goes on after a resume appends to both.

    Raises:
        ConfigError: the tracker's package isn't installed.
        OSError: metrics.jsonl can't be written.
    """
    check_tracker(config)
    return Composite(MetricsFile(run_dir), *_service(config, run_dir))


def record_summary(config: Config, values: dict[str, Any]) -> None:
    """Add the contents of summary.json to the configured tracker, once no rank has it open any more."""
    for service in _service(config, config.run_dir):
        service.summary(values)
        service.close()


class Service(Tracker, Protocol):
    """A tracker that shows the run as a whole as well."""

    def summary(self, values: dict[str, Any]) -> None:
        """Record the contents of summary.json, once, at the end of the run."""


def _service(config: Config, run_dir: str) -> list[Guarded]:
    backends: dict[str, Callable[[Config, str], Service]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
    build = backends.get(config.tracker.kind)
    return [Guarded(config.tracker.kind, lambda: build(config, run_dir))] if build is not None else []


class Composite:
    """Several trackers as one, served in their order."""

    def __init__(self, *trackers: Tracker) -> None:
        self.trackers = trackers

    def log(self, row: Row, step: int) -> None:
        for each in self.trackers:
            each.log(row, step)

    def flush(self) -> None:
        for each in self.trackers:
            each.flush()

    def close(self) -> None:
        for each in self.trackers:
            each.close()


class Guarded:
    """A tracker that may fail: at its first error it says so, once, and is left out from then on."""

    def __init__(self, name: str, build: Callable[[], Service]) -> None:
        self.name = name
        self.tracker: Service | None = None
        self._try("start", lambda: setattr(self, "tracker", build()))

    def _try(self, what: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of a foreign service: anything may come, and nothing of it is worth the training
            self.tracker = None
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            log.warning("tracker=%s failed at %s and is left out from here on (%s: %s); metrics.jsonl goes on",
                        self.name, what, type(error).__name__, reason)  # fmt: skip

    def log(self, row: Row, step: int) -> None:
        if (tracker := self.tracker) is not None:
            self._try(f"step {step}", lambda: tracker.log(row, step))

    def flush(self) -> None:
        if (tracker := self.tracker) is not None:
            self._try("flush", tracker.flush)

    def summary(self, values: dict[str, Any]) -> None:
        if (tracker := self.tracker) is not None:
            self._try("the summary", lambda: tracker.summary(values))

    def close(self) -> None:
        if (tracker := self.tracker) is not None:
            self._try("close", tracker.close)
            self.tracker = None


class Folder:
    """A directory to write in: `<run_dir>/<name>` itself, or a local one that `upload` copies there when that is remote."""

    def __init__(self, run_dir: str, name: str = "") -> None:
        self.target = "/".join(filter(None, [run_dir.rstrip("/"), name]))
        self.remote = "://" in run_dir
        self.local = Path(tempfile.mkdtemp(prefix="tp_trainer_")) if self.remote else Path(self.target)
        self.local.mkdir(parents=True, exist_ok=True)

    def fetch(self, name: str) -> None:
        """Start from the remote file of this name, if there is one."""
        fs, path = self._filesystem()
        if fs.exists(f"{path}/{name}"):
            fs.get_file(f"{path}/{name}", str(self.local / name))

    def upload(self) -> None:
        """Copy every file whole. Object stores can't append, and they replace an object at once: a reader sees no half file."""
        if not self.remote:
            return
        fs, path = self._filesystem()
        for file in sorted(p for p in self.local.rglob("*") if p.is_file()):
            target = f"{path}/{file.relative_to(self.local).as_posix()}"
            fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            fs.put_file(str(file), target)

    def remove(self) -> None:
        """Delete the local copy of a remote directory."""
        if self.remote:
            shutil.rmtree(self.local, ignore_errors=True)

    def _filesystem(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(self.target)
        return fs, path.rstrip("/")


class MetricsFile:
    """<run_dir>/metrics.jsonl: one JSON object per line, append-only, written out line by line, floats in full precision."""

    def __init__(self, run_dir: str) -> None:
        self.folder = Folder(run_dir)
        if self.folder.remote:
            self.folder.fetch("metrics.jsonl")
        self.path = self.folder.local / "metrics.jsonl"
        _drop_torn_line(self.path)
        self.file: TextIO = self.path.open("a", encoding="utf-8")

    def log(self, row: Row, step: int) -> None:
        line = {"step": step, **{key: _json_number(value) for key, value in row.items() if key != "step"}}
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()

    def flush(self) -> None:
        # Rows since the last checkpoint needn't reach remote storage: a run that dies does those steps again.
        self.folder.upload()

    def close(self) -> None:
        self.file.close()
        self.folder.upload()
        self.folder.remove()


class TensorBoard:
    """Event files in <run_dir>/tensorboard, one scalar per number, under the names of metrics.jsonl."""

    def __init__(self, config: Config, run_dir: str) -> None:
        from tensorboardX import SummaryWriter

        self.folder = Folder(run_dir, "tensorboard")
        # files are named by the second: another one's of the same second must stay
        self.writer = SummaryWriter(str(self.folder.local), filename_suffix=f".{uuid.uuid4().hex[:8]}")

    def log(self, row: Row, step: int) -> None:
        for key, value in _numbers(row).items():
            self.writer.add_scalar(key, value, step)

    def flush(self) -> None:
        self.writer.flush()
        self.folder.upload()

    def summary(self, values: dict[str, Any]) -> None:
        self.writer.add_text("summary", f"```\n{json.dumps(values, indent=2, default=str)}\n```")

    def close(self) -> None:
        self.writer.close()
        self.folder.upload()
        self.folder.remove()


class WandB:
    """One W&B run per experiment name: a resumed run goes on in it. WANDB_MODE and the rest of W&B's environment hold."""

    def __init__(self, config: Config, run_dir: str) -> None:
        import wandb

        self.folder = Folder(run_dir, "wandb")
        name = config.experiment_name
        directory = str(self.folder.local if self.folder.remote else self.folder.local.parent)  # W&B adds /wandb itself
        self.run = wandb.init(project=config.tracker.project, id=name, name=name, resume="allow", dir=directory, config=_public(config))
        # Our own step axis: W&B's only ever grows, and would drop the steps that are done again after a resume.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, row: Row, step: int) -> None:
        self.run.log({**_numbers(row), "step": step})

    def flush(self) -> None:
        """Nothing: W&B sends on its own."""

    def summary(self, values: dict[str, Any]) -> None:
        self.run.summary.update(values)

    def close(self) -> None:
        self.run.finish()
        self.folder.upload()  # offline runs, which `wandb sync` can send later
        self.folder.remove()


class MLflow:
    """One MLflow run per experiment name, in the MLflow experiment `tracker.project`: a resumed run goes on in it."""

    def __init__(self, config: Config, run_dir: str) -> None:
        import mlflow

        self.mlflow = mlflow
        self.folder = Folder(run_dir, "mlruns") if config.tracker.uri is None else None
        if self.folder is None:
            mlflow.set_tracking_uri(config.tracker.uri)
        else:  # a database file: MLflow 3 refuses plain directories
            if self.folder.remote:
                self.folder.fetch("mlflow.db")
            mlflow.set_tracking_uri(f"sqlite:///{self.folder.local.resolve()}/mlflow.db")
            if mlflow.get_experiment_by_name(config.tracker.project) is None:  # artifacts would lie in the working directory
                mlflow.create_experiment(config.tracker.project, artifact_location=(self.folder.local / "artifacts").resolve().as_uri())
        mlflow.set_experiment(config.tracker.project)
        name = str(config.experiment_name)
        known = mlflow.search_runs(filter_string=f"tags.tp_trainer = '{name}'", output_format="list", max_results=1)
        if known:
            mlflow.start_run(run_id=known[0].info.run_id)
        else:
            mlflow.start_run(run_name=name, tags={"tp_trainer": name})
            mlflow.log_params(_flat(_public(config)))  # only once: MLflow refuses a parameter's second value

    def log(self, row: Row, step: int) -> None:
        self.mlflow.log_metrics({key: float(value) for key, value in _numbers(row).items()}, step=step)

    def flush(self) -> None:
        if self.folder is not None:
            self.folder.upload()

    def summary(self, values: dict[str, Any]) -> None:
        self.mlflow.log_dict(values, "summary.json")

    def close(self) -> None:
        self.mlflow.end_run()
        if self.folder is not None:
            self.folder.upload()
            self.folder.remove()


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline: a process that was killed while it wrote leaves half a line."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _json_number(value: float | int | None) -> float | int | None:
    """JSON knows no NaN and no infinity; null stands for both."""
    return None if value is None or not math.isfinite(value) else value


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
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + str(key): value})
    return flat
