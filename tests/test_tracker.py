"""Trackers: what reaches the files, what a resume keeps, and that somebody's failing service costs
no training.
"""

from __future__ import annotations

import importlib.machinery
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from configs import TINY_RUN

from tp_trainer.config import Config, ConfigError, load, plain
from tp_trainer.tracker import MetricsFile, Outside, check_tracker, metrics_file, outside
from tp_trainer.tracker.services import build_tracker

pytestmark = pytest.mark.processes


def make_config(kind: str, **tracker: Any) -> Config:
    config = load(TINY_RUN)
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


# --------------------------------------------------------------------------------------------------


def test_metrics_file_keeps_full_precision_and_strict_json(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    tracker = MetricsFile(str(run))
    third = 1 / 3
    tracker.log(
        {
            "step": 7,
            "loss": third,
            "mfu": None,
            "grad_norm": math.nan,
            "lr": math.inf,
            "tokens": 2**40,
        },
        7,
    )
    # flushed per line: readable while the run still holds the file
    assert lines(run / "metrics.jsonl") == [
        {"step": 7, "loss": third, "mfu": None, "grad_norm": None, "lr": None, "tokens": 2**40}
    ]
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
        return [
            json.loads(line)["step"]
            for line in memory.cat_file(f"{base}/metrics.jsonl").decode().splitlines()
        ]

    first = MetricsFile(f"memory:/{base}")
    first.log({"loss": 2.0}, 1)
    first.flush()
    while not memory.exists(f"{base}/metrics.jsonl"):  # beside the training
        time.sleep(0.01)
    assert remote() == [1]
    first.log({"loss": 1.5}, 2)
    assert remote() == [1]  # until the next flush
    first.close()
    second = MetricsFile(f"memory:/{base}")
    second.log({"loss": 1.0}, 3)
    second.close()
    assert remote() == [1, 2, 3]
    assert not second.folder.local.exists()
    board = build_tracker(make_config("tensorboard"), f"memory:/{base}")
    assert board is not None
    board.log({"loss": 1.0}, 3)
    board.close()
    assert any("tfevents" in path for path in memory.find(f"{base}/tensorboard"))


def test_metrics_file_errors_do_raise(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the directory should be")
    with pytest.raises(OSError):
        MetricsFile(str(tmp_path / "run"))


class Storage:
    """A file system at a URL that does as it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.faults: list[Exception] = []
        self.content: dict[str, bytes] = {}
        self.answers = threading.Event()
        self.answers.set()
        monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (self, url))
        monkeypatch.setattr(metrics_file, "PAUSE_SECONDS", 0.0)

    def cat_file(self, path: str) -> bytes:
        if self.faults:
            raise self.faults.pop(0)
        if path not in self.content:
            raise FileNotFoundError(path)
        return self.content[path]

    def pipe_file(self, path: str, content: bytes) -> None:
        self.answers.wait()
        if self.faults:
            raise self.faults.pop(0)
        self.content[path] = content


def test_metrics_of_an_earlier_start_are_not_taken_for_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error while looking is none: written over, the run would have lost its numbers."""
    storage = Storage(monkeypatch)
    storage.content["s3://b/run/metrics.jsonl"] = b'{"step": 1}\n'
    storage.faults = [OSError("503")] * 3
    file = MetricsFile("s3://b/run")
    file.log({}, 2)
    file.close()
    assert storage.content["s3://b/run/metrics.jsonl"] == b'{"step": 1}\n{"step": 2}\n'
    storage.faults = [OSError("503")] * 4
    with pytest.raises(OSError, match="503"):
        MetricsFile("s3://b/run")


def test_storage_that_hangs_holds_no_row_and_is_named_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = Storage(monkeypatch)
    storage.answers.clear()
    monkeypatch.setattr(metrics_file, "CLOSE_SECONDS", 0.1)
    file = MetricsFile("s3://b/run")
    for step in range(3):
        file.log({}, step)
        file.flush()
    said = r"s3://b/run/metrics\.jsonl can't be written \(no answer for 0\.1 s\)"
    with pytest.raises(OSError, match=said):
        file.close()
    assert len(lines(file.path)) == 3, "here it is"
    storage.answers.set()


def test_an_upload_that_failed_is_made_good_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(monkeypatch)
    file = MetricsFile("s3://b/run")
    storage.faults = [OSError("503")] * metrics_file.TRIES
    file.log({}, 1)
    file.flush()
    while file.problem is None:
        time.sleep(0.01)
    assert file.problem == "OSError: 503"
    file.close()
    assert storage.content["s3://b/run/metrics.jsonl"] == b'{"step": 1}\n'


# --------------------------------------------------------------------------------------------------


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = build_tracker(make_config("tensorboard"), str(tmp_path))
    assert tracker is not None
    tracker.log({"step": 1, "loss": 4.25, "mfu": None}, 1)
    tracker.log({"step": 2, "loss": 4.0, "mfu": None}, 2)
    tracker.log({"step": 2, "validation_loss": 4.5}, 2)
    tracker.summary({"goodput": 0.5})
    tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "validation_loss"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 4.25), (2, 4.0)]
    assert any(
        b'"goodput": 0.5' in file.read_bytes() for file in (tmp_path / "tensorboard").iterdir()
    )


def test_wandb_resumes_by_name_and_never_sees_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert tracker is not None
    tracker.log({"loss": 3.0, "mfu": None}, 4)
    tracker.summary({"steps": 4})
    tracker.close()
    (run,) = runs
    assert run.arguments | {"config": None, "dir": None} == {
        "project": "moby",
        "id": "tiny-run",
        "name": "tiny-run",
        "resume": "allow",
        "config": None,
        "dir": None,
    }
    assert "hunter2" not in repr(run.arguments)
    assert (run.rows, run.summary, run.finished) == ([{"loss": 3.0, "step": 4}], {"steps": 4}, True)


def test_mlflow_goes_on_in_the_run_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    known: list[Any] = []

    def record(name: str) -> Any:
        return lambda *arguments, **named: calls.append((name, (*arguments, *named.values())))

    names = (
        "set_tracking_uri create_experiment set_experiment start_run log_params log_metrics"
        " log_dict end_run"
    )
    recorded = {name: record(name) for name in names.split()}
    fake_package(
        monkeypatch,
        "mlflow",
        get_experiment_by_name=lambda name: None,
        search_runs=lambda **_: known,
        **recorded,
    )
    for _ in range(2):
        tracker = build_tracker(make_config("mlflow"), str(tmp_path))
        assert tracker is not None
        tracker.log({"loss": 3, "mfu": None}, 4)
        tracker.close()
        known.append(types.SimpleNamespace(info=types.SimpleNamespace(run_id="run-1")))
    assert calls[0] == ("set_tracking_uri", (f"sqlite:///{tmp_path}/mlruns/mlflow.db",))
    assert [arguments for name, arguments in calls if name == "start_run"] == [
        ("tiny-run", {"tp_trainer": "tiny-run"}),
        ("run-1",),
    ]
    assert [arguments for name, arguments in calls if name == "log_metrics"] == [
        ({"loss": 3.0}, 4)
    ] * 2
    (params,) = [
        arguments[0] for name, arguments in calls if name == "log_params"
    ]  # at the first start only
    assert params["parallelism.tp"] == 2 and "hunter2" not in repr(params)


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "tensorboard"])
def test_a_missing_package_is_refused_on_the_driver(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    package = {"tensorboard": "tensorboardX"}.get(kind, kind)
    with pytest.raises(
        ConfigError, match=rf"^tracker={kind}: .*pip install {package}\b"
    ) as refusal:
        check_tracker(make_config(kind))
    assert "\n" not in str(refusal.value)
    check_tracker(make_config("none"))


# ------------------------------------------------------------------------------ beside the training

FAKE = '''
"""A service that does what FAKE_ORDERS says, and writes down what it is given."""
import atexit, json, os, sys, time

def order(what):
    with open(os.environ["FAKE_LOG"], "a") as log:
        print(json.dumps([what, os.getpid()]), file=log)
    with open(os.environ["FAKE_ORDERS"]) as file:
        orders = json.load(file)
    kind = orders.get(what.split()[0])
    if kind == "refuse":
        raise ConnectionError("no such host\\nand more lines")
    if kind == "exit":
        sys.exit("as some clients do")
    if kind == "hang":
        time.sleep(3600)
    if kind == "die":
        print("Fatal: native code", file=sys.stderr, flush=True)
        os._exit(7)
    if what in orders:
        raise ValueError(f"not {what}")

class Run:
    def __init__(self):
        self.summary = self
    def define_metric(self, *names, **more): pass
    def log(self, row):
        print("chatter")  # on stdout: nobody takes it for an answer
        order(f"log {row['step']}")
    def update(self, values):
        order(f"summary {values['steps']}")
    def finish(self):
        order("finish")

def init(**arguments):
    assert "hunter2" not in repr(arguments) and os.environ["HF_TOKEN"] == "hunter2"
    assert sys.stdin.read() == ""  # what it might ask of a user isn't taken from the requests
    order("init")
    atexit.register(time.sleep, 3600)
    return Run()
'''


class Service:
    """A tracker=wandb whose package is FAKE, and an Outside that feeds it."""

    def __init__(self, tmp_path: Path) -> None:
        (tmp_path / "fake").mkdir()
        (tmp_path / "fake" / "wandb.py").write_text(FAKE)
        self.given, self.orders = tmp_path / "given", tmp_path / "orders"
        self.order()
        self.config = load(
            {
                "experiment_name": "tiny-run",
                "tracker": {"kind": "wandb"},
                "cluster": {"env": {"HF_TOKEN": "hunter2"}},
                "checkpoint": {"storage_path": str(tmp_path)},
                "data": {"seq_length": 64},
                "model": {
                    "architecture": {
                        "model_type": "llama",
                        "vocab_size": 512,
                        "hidden_size": 64,
                        "intermediate_size": 128,
                        "num_hidden_layers": 2,
                        "num_attention_heads": 8,
                        "num_key_value_heads": 4,
                        "max_position_embeddings": 128,
                    }
                },
            }
        )
        self.said: list[str] = []

    def order(self, **orders: str) -> None:
        self.orders.write_text(json.dumps(orders))

    def outside(self) -> Outside:
        environment = {
            "FAKE_LOG": str(self.given),
            "FAKE_ORDERS": str(self.orders),
            **self.config.cluster.env,
        }
        return Outside(self.config, environment, self.said.append)

    def log(self) -> list[tuple[str, int]]:
        text = self.given.read_text() if self.given.is_file() else ""
        return [json.loads(line) for line in text.splitlines()]

    def calls(self) -> list[str]:
        return [call for call, _ in self.log()]

    def processes(self) -> list[int]:
        return sorted({pid for _, pid in self.log()})

    def until(self, condition: Callable[[], Any]) -> None:
        for _ in range(30000):
            if condition():
                return
            time.sleep(0.02)
        pytest.fail(f"said {self.said}, called {self.calls()}")


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    monkeypatch.setattr(outside, "RETRY_SECONDS", (0.05,))
    return Service(tmp_path)


def test_a_tracker_gets_every_row_in_order_and_the_summary_in_one_run(service: Service) -> None:
    tracker = service.outside()
    for step in range(1, 201):
        tracker.log({"step": step, "loss": 1.0, "validation_loss": math.nan}, step)
    tracker.flush()
    assert tracker.finish({"steps": 200}) is None
    assert service.calls() == [
        "init",
        *(f"log {step}" for step in range(1, 201)),
        "summary 200",
        "finish",
    ]
    assert len(service.processes()) == 1 and service.said == []
    tracker.leave()  # does nothing any more


def test_one_that_is_asked_for_nothing_is_not_opened(service: Service) -> None:
    """Workers that refuse to train leave no empty run behind."""
    tracker = service.outside()
    tracker.leave()
    tracker.thread.join(60)
    assert not tracker.thread.is_alive() and service.calls() == []


def test_no_tracker_is_no_process(service: Service) -> None:
    service.config.tracker.kind = "none"
    tracker = service.outside()
    tracker.log({"loss": 1.0}, 1)
    tracker.flush()
    assert tracker.finish({"steps": 1}) is None and tracker.process is None and not tracker.queue


@pytest.mark.parametrize("at", ["init", "log"])
@pytest.mark.parametrize("how", ["refuse", "exit", "die"])
def test_a_failing_tracker_is_told_of_once_and_gets_all_when_it_is_back(
    at: str, how: str, service: Service
) -> None:
    service.order(**{at: how})
    tracker = service.outside()
    for step in range(3, 6):
        tracker.log({"loss": 1.0}, step)
    service.until(lambda: service.said and len(service.processes()) > (1 if at == "init" else 0))
    service.order()
    service.until(lambda: len(tracker.queue) == 0)
    error = tracker.finish({"steps": 5})
    assert error is not None and (error["tracker"], error["since_step"]) == ("wandb", 3)
    reason = {
        "refuse": "ConnectionError: no such host and more lines",
        "exit": "SystemExit: as some clients do",
        "die": "its process has ended: Fatal: native code",
    }[how]
    assert error["reason"] == reason
    delivered = [call for call in service.calls() if call.startswith("log")]
    if how == "die" or at == "init":  # nothing says that it was the row
        assert error["lost_rows"] == 0 and list(dict.fromkeys(delivered)) == [
            "log 3",
            "log 4",
            "log 5",
        ]
    warnings = [line for line in service.said if line.startswith("warning")]
    assert warnings == [
        f"warning: tracker=wandb fails since step 3 ({reason}): training goes on without it, "
        "metrics.jsonl has everything; it is tried again now and then"
    ]
    assert (
        service.said[1:] in (["tracker=wandb answers again: it gets what it has missed"], [])
        or error["lost_rows"]
    )
    assert service.calls()[-2:] == ["summary 5", "finish"]


def test_a_row_that_is_always_refused_does_not_block_the_others(service: Service) -> None:
    service.order(**{"log 2": "never"})
    tracker = service.outside()
    for step in (1, 2, 3):
        tracker.log({"loss": 1.0}, step)
    service.until(lambda: "log 3" in service.calls())
    error = tracker.finish({"steps": 3})
    assert (
        error is not None
        and error["lost_rows"] == 1
        and service.calls().count("log 2") == outside.FAULTS
    )


@pytest.mark.parametrize("at", ["init", "log", "summary", "finish"])
def test_a_hanging_tracker_holds_nobody(
    at: str, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(outside, "START_SECONDS", 0.0)
    monkeypatch.setattr(outside, "END_SECONDS", 1.0)
    service.order(**{at: "hang"})
    tracker = service.outside()
    for step in (7, 8):
        tracker.log({"loss": 1.0}, step)
    reached = {"init": "init", "log": "log 7"}.get(at, "log 8")
    service.until(lambda: reached in service.calls())
    error = tracker.finish({"steps": 8})
    assert error is not None and error["lost_rows"] == {"init": 2, "log": 2}.get(at, 0)
    (pid,) = service.processes()
    service.until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_full_queue_gives_up_the_oldest(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "QUEUED", 10)
    monkeypatch.setattr(outside, "END_SECONDS", 0.5)
    service.order(init="hang")
    tracker = service.outside()
    for step in range(1, 101):
        tracker.log({"loss": 1.0}, step)
    assert [item["step"] for item in tracker.queue] == [
        1,
        *range(92, 101),
    ], "the first may be on its way"
    error = tracker.finish({"steps": 100})
    assert error is not None and error["lost_rows"] == 100


def test_a_tracker_outlives_a_killed_driver_by_its_own_close(
    service: Service, tmp_path: Path
) -> None:
    """SIGKILL leaves it no time to say goodbye: the tracker hears its pipe end, closes and is
    gone."""
    program = tmp_path / "driver.py"
    program.write_text(
        textwrap.dedent("""
        import json, os, signal, sys, time
        from tp_trainer.config import load
        from tp_trainer.tracker import Outside
        values, environment = json.load(sys.stdin)
        tracker = Outside(load(values), environment, print)
        tracker.log({"loss": 1.0}, 1)
        while tracker.queue:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    )
    environment = {
        "FAKE_LOG": str(service.given),
        "FAKE_ORDERS": str(service.orders),
        "HF_TOKEN": "hunter2",
    }
    done = subprocess.run(
        [sys.executable, str(program)],
        input=json.dumps([plain(service.config), environment]),
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == -signal.SIGKILL
    service.until(lambda: service.calls() == ["init", "log 1", "finish"])
    (pid,) = service.processes()
    service.until(lambda: not Path(f"/proc/{pid}").exists())
