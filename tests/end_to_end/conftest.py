"""Fixtures for runs of the whole program.

This directory has no __init__.py: as a package of that name it would stand before the real `ray`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import Launcher, Reference, the_run


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files, made once for all runs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def launcher(tmp_path: Path, cache: Path) -> Iterator[Launcher]:
    made = Launcher(tmp_path, cache)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Reference]:
    made, overrides = Launcher(tmp_path_factory.mktemp("reference"), cache), ("train.max_steps=12",)
    try:
        ended = made.run(*overrides)
        assert ended.code == 0, ended
        assert not made.processes(), "Ray ends with the program"
        yield Reference(ended, the_run(made.storage), overrides, made)
    finally:
        made.close()
