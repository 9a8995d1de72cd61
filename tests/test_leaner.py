"""Memory that runs out at the first step: one more start, without the fast paths that hold it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from configs import TINY_RUN
from ray.train.v2.api.exceptions import WorkerGroupError

from tp_trainer.checkpoint.owner import Owner
from tp_trainer.checkpoint.store import Store
from tp_trainer.config import OutOfMemory, load, to_yaml
from tp_trainer.driver import RunFailed, training, workers
from tp_trainer.driver.ending import Ending
from tp_trainer.messages import FastPath, ModelBuilt, Start
from tp_trainer.tracker import Outside
from tp_trainer.view import View

FAILED = WorkerGroupError("", {0: OutOfMemory("OutOfMemoryError: CUDA out of memory.")})
PATHS = {"compile": FastPath(True, "asked for"), "cuda_graphs": FastPath(True, "default on GPUs")}


def fitting(starts: list[bool], leaner: bool) -> Callable[..., Any]:
    """Workers that are out of memory, and write down whether they were to be lean."""

    def fit(config: Any, recipe: str, start: Start, store: Any, take: Any, *_: Any) -> Any:
        starts.append(start.lean)
        take(ModelBuilt(PATHS, leaner and not start.lean), 0.0)
        return FAILED, None

    return fit


@pytest.mark.parametrize(("leaner", "expected"), [(True, [False, True]), (False, [False])])
def test_a_training_starts_once_more(
    leaner: bool, expected: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    starts: list[bool] = []
    monkeypatch.setattr(training, "fit", fitting(starts, leaner))
    config = load({**TINY_RUN, "checkpoint": {"storage_path": str(tmp_path)}})
    config.tracker.kind = "none"
    store = Store(config.run_dir)
    ending = Ending(config, store, View(), 0.0)
    with pytest.raises(RunFailed, match="CUDA out of memory"):
        training._fit(
            "none", Owner(store, "launch"), Outside(config, {}, print), ending, to_yaml(config)
        )
    summary = store.read_json("summary.json")
    assert starts == expected and summary is not None
    assert (summary["restarts"], len(summary["failures"])) == (0, 1)
    assert summary["fast_paths"]["cuda_graphs"] == {"on": True, "why": "default on GPUs"}


def test_so_does_a_task(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    starts: list[bool] = []
    monkeypatch.setattr(workers, "fit", fitting(starts, leaner=True))
    config, store = load(TINY_RUN), Store(str(tmp_path))
    with pytest.raises(RunFailed, match="CUDA out of memory"):
        workers.fit_once(
            config, "module:function", Start("launch", "none"), store, lambda message, age: None
        )
    assert starts == [False, True]
    assert capsys.readouterr().out == (
        "  fast paths: compile, cuda_graphs\n"
        f"{workers.LEANER}\n"
        "  fast paths: compile, cuda_graphs\n"
    )
