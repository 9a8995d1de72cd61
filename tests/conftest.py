"""Which tests run, and how many at a time (CONTRIBUTING.md says which size to run when).

`pytest` is the standard suite: all but the matrix, which is what is marked so, and of tests marked
`sampled(every)` all cells but one in so many. `pytest -m "not slow"` is the loop while working,
`pytest -m ""` everything; the matrix and all samples are slow. `--rotate` is for CI (rotation.py).
"""

from __future__ import annotations

import os
from collections import defaultdict

import pytest
import rotation

MOST_AT_A_TIME = 8


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rotate",
        type=float,
        metavar="SECONDS",
        help="the standard suite, then cells of the matrix, none begun after so many seconds;"
        " tests with ranks, Ray or processes that fail run once more, and are listed",
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Files side by side where all are asked for: much is waiting. What is named runs right here,
    where a debugger can stop it.
    """
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    return max(2, min(MOST_AT_A_TIME, len(os.sched_getaffinity(0)) // 2))


def pytest_configure(config: pytest.Config) -> None:
    seconds = config.getoption("--rotate")
    if seconds is not None:
        config.option.markexpr = ""
        config.pluginmanager.register(rotation.Rotation(seconds), "rotation")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what the marks imply. The cells that are sampled are those whose parameters' places
    among their values add up to a multiple of `every`: a Latin square, in which no value is left
    out where the other parameters have as many values as `every`, or more.
    """
    places = defaultdict[str, dict[str, int]](dict)  # parameter -> value -> place
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is not None:
            test, total = item.nodeid.partition("[")[0], 0
            for name, value in getattr(item, "callspec").params.items():  # noqa: B009
                known = places[f"{test}:{name}"]
                total += known.setdefault(repr(value), len(known))
            item.add_marker("slow" if total % sampled.args[0] == 0 else "matrix")
        if rotation.is_cell(item):
            item.add_marker("slow")
