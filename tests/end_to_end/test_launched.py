"""The program as people start it: by uv, beside files of their own, after torchrun, under nohup."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from launching import ROOT, Launcher, rows_of, steps_of, summary_of, the_run

pytestmark = pytest.mark.slow

SMALL = ("parallelism=tp2_dp1", "tracker=none", "train.max_steps=6")
LEFT = {  # what torchrun sets for a rank
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def beside(directory: Path, *names: str) -> None:
    """Modules of the user's, of names that Python or a library has."""
    for name in names:
        (directory / f"{name}.py").write_text("raise RuntimeError('shadowed')\n")


def test_by_uv_in_a_subdirectory_among_modules_and_variables_of_others(launcher: Launcher) -> None:
    """Ray looks for an ancestor whose command begins with `uv run`."""
    project = launcher.cwd
    (project / "pyproject.toml").write_text("[project]\nname = 'mine'\nversion = '1'\n")
    launcher.cwd = project / "experiments"
    launcher.storage = launcher.cwd / "outputs"
    launcher.cwd.mkdir()
    beside(launcher.cwd, "statistics", "datasets", "tokenize", "wandb")
    (launcher.cwd / "run").write_text('"$@"\n')  # as uv does: its child, and it waits
    inner = [sys.executable, str(ROOT / "launch.py"), *launcher.quick, *SMALL]
    command = ["bash", "-c", 'exec -a uv bash run "$@"', "bash", *inner]
    ended = launcher.execute(command, {**launcher.env, **LEFT}).wait()
    assert ended.code == 0 and ended.err == "", ended
    assert sorted(steps_of(the_run(launcher.storage))) == [1, 2, 3, 4, 5, 6]
    (session,) = launcher.sessions()
    assert not list((session / "runtime_resources").rglob("*.py")), "nothing is packed"


@pytest.mark.matrix
def test_a_record_of_the_users_beside_the_data(launcher: Launcher) -> None:
    """What a key names is found there, on the driver and on the workers, and nothing else."""
    beside(launcher.cwd, "statistics")
    (launcher.cwd / "mine.py").write_text(
        "from tp_trainer.models.families import RECORDS, Family\n"
        "MINE = RECORDS.get('qwen2', Family('qwen2'))\n"
    )
    ended = launcher.run(*SMALL, "model.family=mine:MINE")
    assert ended.code == 0 and ended.err == "", ended


@pytest.mark.matrix
def test_nohup(launcher: Launcher) -> None:
    command = ["nohup", sys.executable, str(ROOT / "launch.py"), *launcher.quick, *SMALL]
    running = launcher.execute([*command, "train.max_steps=60"])
    launcher.until(
        lambda: launcher.storage.is_dir() and rows_of(the_run(launcher.storage)), running
    )
    os.killpg(running.pid, signal.SIGHUP)
    ended = running.wait()
    assert ended.code == 0, ended
    assert summary_of(the_run(launcher.storage))["status"] == "finished"
