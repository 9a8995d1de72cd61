"""What the documentation names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tp_trainer"
PAGES = [ROOT / "docs" / "life-of-a-batch.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"`([\w/.]+\.(?:py|yaml|md)|\w+/)`", page.read_text()))
    absent = [name for name in named if not any((base / name).exists() for base in (ROOT, PACKAGE))]
    assert named and not absent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_that_a_page_takes_from_the_code_is_in_it(page: Path) -> None:
    code = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    names = set(re.findall(r"`(?:\w+\.)*(_?[A-Za-z]\w+)(?:\([\w, ]*\))?`", page.read_text()))
    assert names and not [name for name in names if not re.search(rf"\b{name}\b", code)]


@pytest.mark.slow
def test_the_table_of_families_is_not_stale() -> None:
    """It is of one release of transformers; with another it can't be told."""
    page = ROOT / "docs" / "families.md"
    written = re.search(r"^transformers ([\w.]+),", page.read_text(), re.MULTILINE)
    assert written is not None
    if written[1] != transformers.__version__:
        pytest.skip(f"it is of {written[1]}: python benchmarks/families.py --write")
    command = [sys.executable, "benchmarks/families.py"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert made.stdout == page.read_text(), "python benchmarks/families.py --write"
