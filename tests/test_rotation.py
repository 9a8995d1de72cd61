"""What conftest.py makes of the marks, and what CI's run of it does with failures."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import pathlib
import pytest

def fails_once(name):
    flag = pathlib.Path(__file__).parent / name
    if not flag.exists():
        flag.touch()
        raise AssertionError(f"for the first time: {name}")

@pytest.mark.parametrize("name", NAMES)
def test_fails_once(name):
    fails_once(name)

@pytest.mark.matrix
@pytest.mark.parametrize("number", range(6))
def test_cell(number):
    pass

@pytest.mark.sampled(3)
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(3))
def test_latin_square(a, b):
    pass
"""


def ran(
    where: Path, *arguments: str, unsteady: int = 0, inside: str = "distributed"
) -> tuple[int, str]:
    """pytest's code and output, of a suite of its own in which so many tests fail once."""
    for directory in (where, where / inside):
        directory.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).parent / "conftest.py", where)
    (where / "pytest.ini").write_text('[pytest]\naddopts = -m "not matrix"\n')
    names = [f"{inside}-{number}" for number in range(unsteady)]
    (where / inside / "test_it.py").write_text(SUITE.replace("NAMES", repr(names)))
    command = [sys.executable, "-m", "pytest", "-v", "-W", "ignore", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *arguments], cwd=where, capture_output=True, text=True)
    return done.returncode, done.stdout


def test_three_sizes(tmp_path: Path) -> None:
    standard = ran(tmp_path)[1]
    assert "3 passed" in standard
    for a in range(3):  # each value of each parameter
        assert standard.count(f"test_latin_square[{a}-") == standard.count(f"-{a}] PASSED") == 1
    assert "15 deselected" in ran(tmp_path, "-m", "not slow")[1]
    assert "15 passed" in ran(tmp_path, "-m", "")[1]


def test_cells_are_begun_while_there_is_time(tmp_path: Path) -> None:
    code, out = ran(tmp_path, "--rotate", "60")
    assert code == 0 and "15 passed" in out and "12 of 12 cells ran" in out, out
    code, out = ran(tmp_path, "--rotate", "0")
    assert code == 0 and "3 passed" in out and "0 of 12 cells ran" in out, out
    assert "\n  distributed/test_it.py::test_cell[0]\n" in out


@pytest.mark.parametrize(("unsteady", "code"), [(2, 0), (3, 1)])
def test_what_fails_once_is_listed_and_three_are_too_many(
    unsteady: int, code: int, tmp_path: Path
) -> None:
    found, out = ran(tmp_path, "--rotate", "60", unsteady=unsteady)
    assert found == code, out
    assert f"{unsteady} unsteady" in out and "for the first time: distributed-0" in out


def test_a_unit_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    assert ran(tmp_path, "--rotate", "60", unsteady=1, inside="units")[0] == 1


def test_nor_is_any_without_rotate(tmp_path: Path) -> None:
    assert ran(tmp_path, unsteady=1)[0] == 1
