"""What CI does beside the standard suite: cells of the matrix in an order that the commit's hash
gives, as far as the time goes, and a second try for what may be unsteady.
"""

from __future__ import annotations

import hashlib
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

HERE = Path(__file__).parent
GRACE_SECONDS = 180  # past --rotate's, in which a test is still tried again
UNSTEADY = 3  # so many turn a run red


def is_cell(item: pytest.Item) -> bool:
    return item.get_closest_marker("matrix") is not None


def _commit() -> str:
    """The checked-out commit's hash, empty without one."""
    command = ["git", "rev-parse", "HEAD"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout


class ByFile(LoadScopeScheduling):
    """Files go to whoever is free, and after them the cells, one by one: they begin where a file
    comes up again.
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        self.scopes, self.file, self.cells = dict[str, str](), "", False

    def _split_scope(self, nodeid: str) -> str:
        if nodeid not in self.scopes:  # each is asked for in turn, before any has run
            file = nodeid.partition("::")[0]
            self.cells |= file != self.file and file in self.scopes.values()
            self.file = file
            self.scopes[nodeid] = nodeid if self.cells else file
        return self.scopes[nodeid]


class Rotation:
    """The standard suite, then what of the matrix there is time for; unsteady tests are listed.
    With xdist each worker decides for itself, and tells the controller, which reports.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.cells, self.left = 0, set[str]()
        self.unsteady = dict[str, str]()  # test -> the text of its first failure
        self.seconds = defaultdict[str, float](float)  # by file

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> LoadScopeScheduling:
        return ByFile(config, log)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        commit = _commit()

        def place(item: pytest.Item) -> str:
            return hashlib.sha256((commit + item.nodeid).encode()).hexdigest()

        cells = sorted((item for item in items if is_cell(item)), key=place)
        items[:] = [*(item for item in items if not is_cell(item)), *cells]
        self.cells = len(cells)

    @pytest.hookimpl(tryfirst=True)  # before that of pytest-rerunfailures
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        now = time.monotonic()
        if is_cell(item) and now > self.end:
            self.left.add(item.nodeid)
            return True  # as if it had run
        several = {HERE / "distributed", HERE / "end_to_end"} & set(item.path.parents)
        if (several or item.get_closest_marker("processes")) and now < self.end + GRACE_SECONDS:
            item.add_marker(pytest.mark.flaky(reruns=1))
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid.partition("::")[0]] += report.duration
        if str(report.outcome) == "rerun":
            self.unsteady.setdefault(report.nodeid, report.longreprtext)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        cells, left = getattr(node, "workeroutput", {}).get("rotation", (0, ()))
        self.cells = max(self.cells, cells)
        self.left |= set(left)

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Iterator[None]:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["rotation"] = (self.cells, sorted(self.left))
        yield
        if len(self.unsteady) >= UNSTEADY and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        longest = sorted(self.seconds.items(), key=lambda each: -each[1])[:25]
        write(f"seconds by file: {', '.join(f'{file} {used:.0f}' for file, used in longest)}")
        write(f"matrix: {self.cells - len(self.left)} of {self.cells} cells ran; not these:")
        for name in sorted(self.left):
            write(f"  {name}")
        if self.unsteady:
            terminalreporter.section(f"{len(self.unsteady)} unsteady, {UNSTEADY} are too many")
        for name, text in self.unsteady.items():
            write(f"{name}\n{text}\n")
