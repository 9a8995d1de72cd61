"""The linter, the type checker, the import contract and a few counts, as tests: `pytest` is the one
command that says all is well.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent


def run(*command: str) -> None:
    done = subprocess.run(
        [str(TOOLS / command[0]), *command[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff() -> None:
    run("ruff", "check", "tp_trainer", "tests", "launch.py")


def test_text_files_are_utf8_whatever_the_locale() -> None:
    run("ruff", "check", "--preview", "--select", "PLW1514", "tp_trainer", "launch.py")


def test_format() -> None:
    run("ruff", "format", "--check", ".")


def test_types() -> None:
    run("mypy", "tp_trainer", "tests", "launch.py")


def test_import_contract() -> None:
    run("lint-imports")


# ------------------------------------------------------------------------------------ counts

FILE_LINES, FUNCTION_LINES = 350, 60
# where configs are plain dictionaries: what a user typed, before it is a Config
DOORS = ("cli/", "config/")
# arithmetic on ranks, and on what an axis being absent means
RANKS = re.compile(r"\brank\b *(//|%)|(\b(dp|tp)_size|\.size) *[=!]= *1\b")
SOURCES = sorted((ROOT / "tp_trainer").rglob("*.py"))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_no_file_and_no_function_is_long() -> None:
    long = []
    for path in SOURCES:
        text = path.read_text()
        if text.count("\n") > FILE_LINES:
            long.append(f"{path}: {text.count(chr(10))} lines")
        for node in functions(ast.parse(text)):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > FUNCTION_LINES:
                long.append(f"{path}: {node.name}, {length} lines")
    assert not long, "\n".join(long)


def test_no_public_function_takes_or_gives_a_dictionary_of_anything() -> None:
    loose = []
    for path in SOURCES:
        if not str(path.relative_to(ROOT / "tp_trainer")).startswith(DOORS):
            for node in functions(ast.parse(path.read_text())):
                given = ast.unparse(node.args) + (ast.unparse(node.returns) if node.returns else "")
                if not node.name.startswith("_") and "dict[str, Any]" in given:
                    loose.append(f"{path}: {node.name}({given})")
    assert not loose, "\n".join(loose)


def test_ranks_are_reckoned_with_in_parallel_alone() -> None:
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in SOURCES
        if not str(path.relative_to(ROOT / "tp_trainer")).startswith(("parallel/", "config/"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if RANKS.search(line)
    ]
    assert not found, "\n".join(found)
