"""Trackers: what reaches the files, what a resume keeps, and that somebody's failing service costs no training."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import math
import sys
import types
import uuid
from pathlib import Path
from typing import Any

import pytest

from tp_trainer.config import Config, ConfigError
from tp_trainer.tracker import Composite, Guarded, MetricsFile, build_tracker, check_tracker, record_summary


def make_config(kind: str, **tracker: Any) -> Config:
    config = Config(experiment_name="tiny-run")
    config.tracker.kind = kind
    for key, value in tracker.items():
        setattr(config.tracker, key, value)
    config.cluster.env = {"HF_TOKEN": "hunter2"}
    return config


def lines(path: Path | str) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text().splitlines()]


def fake_package(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in contents.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


# ---------------------------------------------------------------------------------------------------- metrics.jsonl


def test_metrics_file_keeps_full_precision_and_strict_json(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    tracker = build_tracker(make_config("none"), str(run))
    third = 1 / 3
    tracker.log({"step": 7, "loss": third, "mfu": None, "grad_norm": math.nan, "lr": math.inf, "tokens": 2**40}, 7)
    # flushed per line: readable while the run still holds the file
    assert lines(run / "metrics.jsonl") == [{"step": 7, "loss": third, "mfu": None, "grad_norm": None, "lr": None, "tokens": 2**40}]
    tracker.log({"validation_loss": 5.0}, 7)
    tracker.close()
    assert lines(run / "metrics.jsonl")[1] == {"step": 7, "validation_loss": 5.0}


def test_metrics_file_appends_after_a_resume_and_drops_a_torn_line(tmp_path: Path) -> None:
    first = MetricsFile(str(tmp_path))
    first.log({"loss": 2.0}, 1)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # killed while writing
    second = MetricsFile(str(tmp_path))
    second.log({"loss": 1.0}, 2)
    second.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def test_metrics_file_on_remote_storage(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    base = f"/{uuid.uuid4().hex}/run"
    memory = fsspec.filesystem("memory")

    def remote() -> list[int]:
        return [json.loads(line)["step"] for line in memory.cat_file(f"{base}/metrics.jsonl").decode().splitlines()]

    first = build_tracker(make_config("tensorboard"), f"memory:/{base}")
    first.log({"loss": 2.0}, 1)
    first.flush()
    assert remote() == [1]
    first.log({"loss": 1.5}, 2)
    assert remote() == [1]  # until the next flush
    first.close()
    second = MetricsFile(f"memory:/{base}")
    second.log({"loss": 1.0}, 3)
    second.close()
    assert remote() == [1, 2, 3]
    assert not second.folder.local.exists()
    assert any("tfevents" in path for path in memory.find(f"{base}/tensorboard"))


def test_metrics_file_errors_do_raise(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the directory should be")
    with pytest.raises(OSError):
        build_tracker(make_config("none"), str(tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------- the others


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = build_tracker(make_config("tensorboard"), str(tmp_path))
    tracker.log({"step": 1, "loss": 4.25, "mfu": None}, 1)
    tracker.log({"step": 2, "loss": 4.0, "mfu": None}, 2)
    tracker.log({"step": 2, "validation_loss": 4.5}, 2)
    tracker.close()
    config = make_config("tensorboard")
    config.checkpoint.storage_path, config.experiment_name = str(tmp_path.parent), tmp_path.name
    record_summary(config, {"goodput": 0.5})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "validation_loss"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.25), (2, 4.0)]
    assert any(b'"goodput": 0.5' in file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())


def test_wandb_resumes_by_name_and_never_sees_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        def __init__(self, **arguments: Any) -> None:
            self.arguments, self.finished = arguments, False
            self.rows: list[dict[str, Any]] = []
            self.summary: dict[str, Any] = {}
            runs.append(self)

        def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

        def log(self, row: dict[str, Any]) -> None:
            self.rows.append(row)

        def finish(self) -> None:
            self.finished = True

    runs: list[Any] = []
    fake_package(monkeypatch, "wandb", init=Run)
    tracker = build_tracker(make_config("wandb", project="moby"), str(tmp_path))
    tracker.log({"loss": 3.0, "mfu": None}, 4)
    tracker.close()
    (run,) = runs
    assert run.arguments | {"config": None, "dir": None} == {
        "project": "moby", "id": "tiny-run", "name": "tiny-run", "resume": "allow", "config": None, "dir": None,
    }  # fmt: skip
    assert "hunter2" not in repr(run.arguments)
    assert (run.rows, run.summary, run.finished) == ([{"loss": 3.0, "step": 4}], {}, True)
    config = make_config("wandb", project="moby")
    config.checkpoint.storage_path = str(tmp_path)
    record_summary(config, {"steps": 4})
    assert runs[1].arguments["id"] == "tiny-run" and runs[1].summary == {"steps": 4} and runs[1].finished
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 4, "loss": 3.0, "mfu": None}]


def test_mlflow_goes_on_in_the_run_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    known: list[Any] = []

    def record(name: str) -> Any:
        return lambda *arguments, **named: calls.append((name, (*arguments, *named.values())))

    names = "set_tracking_uri create_experiment set_experiment start_run log_params log_metrics log_dict end_run"
    recorded = {name: record(name) for name in names.split()}
    fake_package(monkeypatch, "mlflow", get_experiment_by_name=lambda name: None, search_runs=lambda **_: known, **recorded)
    for _ in range(2):
        tracker = build_tracker(make_config("mlflow"), str(tmp_path))
        tracker.log({"loss": 3, "mfu": None}, 4)
        tracker.close()
        known.append(types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-1")))
    assert calls[0] == ("set_tracking_uri", (f"sqlite:///{tmp_path}/mlruns/mlflow.db",))
    assert [arguments for name, arguments in calls if name == "start_run"] == [("tiny-run", {"tp_trainer": "tiny-run"}), ("run-1",)]
    assert [arguments for name, arguments in calls if name == "log_metrics"] == [({"loss": 3.0}, 4)] * 2
    (params,) = [arguments[0] for name, arguments in calls if name == "log_params"]  # at the first start only
    assert params["parallelism.tp"] == 2 and "hunter2" not in repr(params)


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "tensorboard"])
def test_a_missing_package_is_refused_on_the_driver(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    package = {"tensorboard": "tensorboardX"}.get(kind, kind)
    with pytest.raises(ConfigError, match=rf"^tracker={kind}: .*pip install {package}\b") as refusal:
        check_tracker(make_config(kind))
    assert "\n" not in str(refusal.value)
    check_tracker(make_config("none"))


@pytest.mark.parametrize("where", ["start", "log", "close"])
def test_a_failing_service_is_left_out_with_one_warning(where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing:
        def __init__(self) -> None:
            self.call("start")

        def call(self, name: str) -> None:
            if name == where:
                raise ConnectionError("no such host\nand more lines")

        def log(self, row: Any, step: int) -> None:
            self.call("log")

        def flush(self) -> None: ...

        def summary(self, values: dict[str, Any]) -> None: ...

        def close(self) -> None:
            self.call("close")

    with caplog.at_level(logging.WARNING):
        tracker = Composite(MetricsFile(str(tmp_path)), Guarded("wandb", Failing))
        for step in range(3):
            tracker.log({"loss": 1.0}, step)
            tracker.flush()
        tracker.close()
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    (warning,) = caplog.messages
    assert "tracker=wandb" in warning and "no such host" in warning and "\n" not in warning
