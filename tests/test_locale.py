"""The command line where the locale is ASCII, or a stream can't say a character."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from configs import TINY_RUN

ROOT = Path(__file__).resolve().parent.parent
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def launched(
    directory: Path, environment: dict[str, str], *words: str, flags: tuple[str, ...] = ()
) -> tuple[int, str]:
    """Exit code and output, as bytes through a pipe."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    done = subprocess.run(
        [sys.executable, *flags, str(ROOT / "launch.py"), *words],
        cwd=directory,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout.decode("utf-8")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "模型").mkdir()
    numbers = TINY_RUN["model"]["architecture"]
    (tmp_path / "模型" / "config.json").write_text(json.dumps(numbers), encoding="utf-8")
    text = json.dumps({"text": "鲸 — whale"}, ensure_ascii=False)
    (tmp_path / "数据.jsonl").write_text(f"{text}\n", encoding="utf-8")
    return tmp_path


CHOSEN = ("model.name='模型'", "model.weights=random", "data.name='数据.jsonl'", "dry_run=true")
STREAMS = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8"}


@pytest.mark.parametrize("environment", [ASCII, STREAMS, {"LC_ALL": "C"}], ids=str)
def test_an_ascii_locale_meets_files_in_utf8(directory: Path, environment: dict[str, str]) -> None:
    code, out = launched(directory, environment, *CHOSEN)
    assert code == 0, out
    said = "name: 数据.jsonl" if "PYTHONIOENCODING" not in environment else r"\u6570\u636e.jsonl"
    assert said in out and "experiment_name: llama-" in out
    # with the name that it has anywhere else
    assert out.split("experiment_name: ")[1][:60] in launched(directory, {}, *CHOSEN)[1]


@pytest.mark.parametrize("environment", [ASCII, STREAMS], ids=str)
def test_a_refusal_in_an_ascii_locale(directory: Path, environment: dict[str, str]) -> None:
    code, out = launched(directory, environment, *CHOSEN[:2], "data.name='缺.jsonl'")
    assert code == 2 and out.startswith("error: data.name=") and "Traceback" not in out


def test_a_python_that_heeds_no_environment_is_not_started_over_and_over(directory: Path) -> None:
    code, out = launched(directory, ASCII, "optim.lr=-1", flags=("-X", "utf8=0"))
    assert code == 2 and out.startswith("error: optim.lr=-1")
