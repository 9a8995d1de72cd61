"""What is left of a run that ends before its time."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tp_trainer.checkpoint.state import RunState
from tp_trainer.checkpoint.store import Store
from tp_trainer.config import COMMAND, load
from tp_trainer.driver.ending import Ending, Place
from tp_trainer.driver.monitor import RunMonitor
from tp_trainer.messages import Alive, StepDone, TrainingBegan
from tp_trainer.tracker import Outside
from tp_trainer.view import View

TINY = {
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}

BEGAN = TrainingBegan(step=4, total_steps=10, device="cpu", model="m", data=None)


@pytest.fixture
def ending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the ending of a run with `checkpoint.resume` as given and checkpoints at some steps."""

    def make(resume: str = "auto", *steps: int) -> Ending:
        words = [
            "python",
            "launch.py",
            "experiment_name=a b",
            f"checkpoint.resume={resume}",
            "optim.lr=1",
        ]
        monkeypatch.setenv(COMMAND, json.dumps(words))
        config = load(
            {
                "experiment_name": "a",
                "model": {"architecture": TINY},
                "checkpoint": {"storage_path": str(tmp_path), "resume": resume},
            }
        )
        store = Store(config.run_dir)
        for step in steps:
            state = RunState(step, epoch=0, offset=0, tokens=0, global_batch_size=8)
            store.commit(store.begin(step), state, b"{}", {})
        config.tracker.kind = "none"
        return Ending(config, store, View(), 0.0)

    return make


def summary(tmp_path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((tmp_path / "a" / "summary.json").read_text())
    return values


def test_a_stop_before_the_first_step(
    ending: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ending("auto", 4, 8)
    made.interrupted(KeyboardInterrupt())
    made.interrupted(KeyboardInterrupt())
    assert (summary(tmp_path)["status"], summary(tmp_path)["steps"]) == ("stopped", 8)
    assert summary(tmp_path)["checkpoint"] == f"{tmp_path}/a/step_00000008"
    command = "python launch.py 'experiment_name=a b' checkpoint.resume=auto optim.lr=1"
    assert summary(tmp_path)["resume_command"] == command
    out = capsys.readouterr().out
    assert (
        out.count("go on with") == 1
        and command in out
        and out.startswith("stopped\n")
        and "step_00000008" in out
    )
    ending().interrupted(None)
    ending().interrupted(ValueError())
    assert capsys.readouterr().out == ""


def test_never_is_said_once(ending: Any) -> None:
    """Until what was there is set aside the run has not begun; after that, the command goes on."""
    made = ending("never", 4)
    command = "python launch.py 'experiment_name=a b' checkpoint.resume=never optim.lr=1"
    assert made.place() == Place(steps=0, checkpoint=None, resume_command=command)
    made.cleared = True
    assert (
        made.command() == "python launch.py 'experiment_name=a b' optim.lr=1 checkpoint.resume=auto"
    )


def test_the_summary_of_a_finished_run_stays(ending: Any, tmp_path: Path) -> None:
    made = ending("auto", 4)
    made.store.write_json("summary.json", {"status": "finished", "loss": 1})
    made.early("refused")
    assert summary(tmp_path) == {"status": "finished", "loss": 1}
    made = ending("never")
    made.store.write_json("summary.json", {"status": "stopped", "loss": 1})
    made.interrupted(SystemExit(143))
    assert summary(tmp_path)["loss"] == 1, "it is of the run that is still there"


def test_a_second_signal_leaves_no_summary(
    ending: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ending("auto", 4)
    made.monitor = RunMonitor(made.config, View(), Outside(made.config, {}, print))
    made.monitor.take(BEGAN)
    made.monitor.take(StepDone(5, 1.0))
    made.interrupted(KeyboardInterrupt())
    assert not (tmp_path / "a" / "summary.json").exists()
    assert "steps          5" in capsys.readouterr().out


def test_no_command_line_no_command(ending: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ending()
    monkeypatch.delenv(COMMAND)
    assert made.command() is None


def test_config_yaml_waits_for_the_first_step(ending: Any) -> None:
    """A start that is refused by the workers doesn't change what the checkpoints are said to be."""
    made, began = ending("auto", 4), []
    monitor = RunMonitor(made.config, View(), Outside(made.config, {}, print))
    monitor.at_begin = lambda: began.append(True)
    monitor.take(Alive(1.0))
    assert not began
    for _ in range(2):
        monitor.take(BEGAN)
    assert began == [True]


def test_a_command_survives_a_shell() -> None:
    assert shlex.split(shlex.join(["data.name=it's a file", "x=${y}"])) == [
        "data.name=it's a file",
        "x=${y}",
    ]
