"""The linter, the type checker and the import contract, as tests: `pytest` is the one command that says all is well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent


def run(*command: str) -> None:
    done = subprocess.run([str(TOOLS / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff() -> None:
    run("ruff", "check", "tp_trainer", "tests", "launch.py")


def test_types() -> None:
    run("mypy", "tp_trainer", "tests", "launch.py")


def test_import_contract() -> None:
    run("lint-imports")
