"""The wheel: what it holds, and that it runs where there is no repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (path,) = folder.glob("tp_trainer-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel alone in a directory; its dependencies are this interpreter's."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--target", str(target), str(wheel))
    return target


def pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    # the path's entries go before site-packages, and so before an editable install of the
    # repository
    env = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "PATH": f"{installed / 'bin'}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


def test_wheel_holds_configuration_assets_and_the_entry_point(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        assert "tp-trainer = tp_trainer.cli:main" in archive.read(entry_points).decode()
    shipped = {
        f"tp_trainer/conf/{path.relative_to(ROOT / 'conf').as_posix()}"
        for path in (ROOT / "conf").rglob("*.yaml")
    }
    assert "tp_trainer/conf/config.yaml" in shipped
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tp_trainer").rglob("*.py")}
    assert shipped | code <= names
    assert "tp_trainer/assets/moby-dick.txt" in names
    assert any(name.startswith("tp_trainer/assets/tokenizer/") for name in names)
    assert any(name.endswith("LICENSE") for name in names)
    assert not [
        name
        for name in names
        if name.startswith(("tests/", "conf/", "benchmarks/")) or "__pycache__" in name
    ]


def test_installed_wheel_composes_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    where = run(
        installed,
        tmp_path,
        sys.executable,
        "-c",
        "import tp_trainer.config as c; print(c.__file__)",
    )
    assert where.stdout.startswith(str(installed)), where.stdout + where.stderr
    done = run(installed, tmp_path, "tp-trainer", "dry_run=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "experiment_name" in done.stdout
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


@pytest.mark.slow
def test_installed_wheel_trains_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    """Its own text, tokenizer and configuration; the workers import the installed package too."""
    overrides = [
        "parallelism=tp2_dp1",
        "model.overrides.num_hidden_layers=1",
        "data.seq_length=32",
        "train.max_steps=3",
        "train.eval_batches=1",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]
    done = run(installed, tmp_path, "tp-trainer", *overrides)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    (run_dir,) = (tmp_path / "outputs").iterdir()
    assert {"config.yaml", "metrics.jsonl", "summary.json", "step_00000003", "tensorboard"} <= {
        path.name for path in run_dir.iterdir()
    }
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["world"]) == ("finished", 3, 2)
    assert str(run_dir) in done.stdout
    again = run(installed, tmp_path, "tp-trainer", "--config-path", str(run_dir))
    assert again.returncode == 0 and "this run has finished" in again.stdout, (
        again.stdout + again.stderr
    )
