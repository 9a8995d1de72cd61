"""Which tests run, and what CI does beside (CONTRIBUTING.md says which size to run when).

`pytest` is the standard suite: all but the matrix, which is what is marked so, and of tests marked
`sampled(every)` all cells but one in so many. `pytest -m "not slow"` is the loop while working,
`pytest -m ""` everything; the matrix and all samples are slow. `--rotate` is for CI: after the
standard suite it runs cells of the matrix in an order that the commit's hash gives, as far as the
time goes.
"""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
GRACE_SECONDS = 180  # past --rotate's, in which a test is still tried again
UNSTEADY = 3  # so many turn a run red


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rotate",
        type=float,
        metavar="SECONDS",
        help="the standard suite, then cells of the matrix, none begun after so many seconds;"
        " tests with ranks, Ray or processes that fail run once more, and are listed",
    )


def pytest_configure(config: pytest.Config) -> None:
    seconds = config.getoption("--rotate")
    if seconds is not None:
        config.option.markexpr = ""
        config.pluginmanager.register(Rotation(seconds), "rotation")


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
        if _is_cell(item):
            item.add_marker("slow")


def _is_cell(item: pytest.Item) -> bool:
    return item.get_closest_marker("matrix") is not None


def _commit() -> str:
    """The checked-out commit's hash, empty without one."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout


class Rotation:
    """The standard suite, then what of the matrix there is time for; unsteady tests are listed."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.cells, self.left = set[str](), list[str]()
        self.unsteady = dict[str, str]()  # test -> the text of its first failure
        self.seconds = defaultdict[str, float](float)  # by file

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        commit = _commit()

        def place(item: pytest.Item) -> str:
            return hashlib.sha256((commit + item.nodeid).encode()).hexdigest()

        cells = sorted((item for item in items if _is_cell(item)), key=place)
        items[:] = [*(item for item in items if not _is_cell(item)), *cells]
        self.cells = {item.nodeid for item in cells}

    @pytest.hookimpl(tryfirst=True)  # before that of pytest-rerunfailures
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        now = time.monotonic()
        if _is_cell(item) and now > self.end:
            self.left.append(item.nodeid)
            return True  # as if it had run
        several = {HERE / "distributed", HERE / "end_to_end"} & set(item.path.parents)
        if (several or item.get_closest_marker("processes")) and now < self.end + GRACE_SECONDS:
            item.add_marker(pytest.mark.flaky(reruns=1))
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell = " (cells)" if report.nodeid in self.cells else ""
        self.seconds[report.nodeid.partition("::")[0] + cell] += report.duration
        if str(report.outcome) == "rerun":
            self.unsteady.setdefault(report.nodeid, report.longreprtext)

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        yield
        if len(self.unsteady) >= UNSTEADY and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        longest = sorted(self.seconds.items(), key=lambda each: -each[1])
        standard = sum(used for file, used in longest if not file.endswith(")"))
        write(f"the standard suite took {standard:.0f} s")
        write(f"seconds by file: {', '.join(f'{file} {used:.0f}' for file, used in longest[:40])}")
        ran = len(self.cells) - len(self.left)
        write(f"matrix: {ran} of {len(self.cells)} cells ran; not these:")
        for name in sorted(self.left):
            write(f"  {name}")
        if self.unsteady:
            terminalreporter.section(f"{len(self.unsteady)} unsteady, {UNSTEADY} are too many")
        for name, text in self.unsteady.items():
            write(f"{name}\n{text}\n")


@pytest.fixture
def without_ray() -> None:
    """No Ray of other tests in this process."""
    import ray

    ray.shutdown()
