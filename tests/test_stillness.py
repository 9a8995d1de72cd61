"""What hangs stands still; what is slow does not."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from stillness import Stillness, cpu_seconds, with_descendants

SPIN = "while True: pass"
GLOO = f"""
import ctypes, threading
def loop():
    ctypes.CDLL(None).prctl(15, b"gloo_tcp_loop")
    {SPIN}
threading.Thread(target=loop).start()
"""
NAP = "import time\ntime.sleep(3600)"
CHILD = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {SPIN!r}])"


@pytest.fixture
def process() -> Iterator[Callable[[str], int]]:
    started = []

    def start(code: str) -> int:
        started.append(subprocess.Popen([sys.executable, "-c", code]))
        return started[-1].pid

    yield start
    for pid in with_descendants(each.pid for each in started):
        subprocess.run(["kill", "-9", str(pid)], check=True)
    for each in started:
        each.wait()


def looks(pid: int) -> Iterator[bool]:
    """For two seconds, of a window of one."""
    still, end = Stillness(lambda: with_descendants([pid]), 0.05, 1.0), time.monotonic() + 2
    while time.monotonic() < end:
        yield still()
        time.sleep(0.05)


@pytest.mark.parametrize("code", [SPIN, CHILD], ids=["itself", "in a child"])
def test_what_works_does_not_stand_still(code: str, process: Callable[[str], int]) -> None:
    pid = process(code)
    while cpu_seconds(with_descendants([pid])) < 0.5:
        time.sleep(0.05)
    assert not any(looks(pid))


def test_what_waits_stands_still(process: Callable[[str], int]) -> None:
    pid = process(NAP)
    while not any(looks(pid)):  # once it has started
        pass


def test_gloos_threads_are_no_work(process: Callable[[str], int]) -> None:
    """They poll, and those of many groups do so for good."""
    pid = process(GLOO)
    while not any(looks(pid)):
        pass


def test_a_process_that_is_gone_uses_nothing() -> None:
    assert cpu_seconds([2**22 + 1]) == 0.0
