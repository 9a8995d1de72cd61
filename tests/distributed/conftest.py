"""Fixtures of the tests that need several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four processes; `ranks.run(world, function, *args)` gives each rank's result."""
    pool = RankPool()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `plain_reference.saved` puts models."""
    return tmp_path_factory.mktemp("models")
