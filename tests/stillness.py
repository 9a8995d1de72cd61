"""Whether processes stand still: by what they have had of the processors, not by the clock, so that
nothing fails because a machine is slow or busy.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
INTERVAL = 1.0  # seconds between two looks


def _stat(path: str) -> list[str]:
    """/proc's fields from the state on; none of what is gone."""
    with suppress(OSError):
        return Path(f"/proc/{path}/stat").read_text().rpartition(")")[2].split()
    return []


def _ticks(path: str, fields: slice) -> int:
    return sum(map(int, _stat(path)[fields]))


def _used(pid: int) -> float:
    """Its CPU seconds and those of its children that have ended, without what gloo's threads use:
    they look for messages all the time, each a little, and a hundred are a processor's work.
    """
    total = _ticks(f"{pid}", slice(11, 15))
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                if Path(f"/proc/{pid}/task/{thread}/comm").read_text().startswith("gloo_tcp_loop"):
                    total -= _ticks(f"{pid}/task/{thread}", slice(11, 13))
    return total / TICK


def cpu_seconds(pids: Iterable[int]) -> float:
    """What these have used, and those of their children that have ended."""
    return sum(map(_used, pids))


def with_descendants(pids: Iterable[int]) -> set[int]:
    parents = {
        int(entry): int(stat[1])
        for entry in os.listdir("/proc")
        if entry.isdigit() and (stat := _stat(entry))
    }
    found, new = set[int](), set(pids)
    while new:
        found |= new
        new = {pid for pid, parent in parents.items() if parent in new} - found
    return found


class Stillness:
    """Of processes that should be at work.

    Args:
        processes: those that are there now.
        least: CPU seconds, below which they stand still,
        window: if it's all that they used in so many seconds.
    """

    def __init__(self, processes: Callable[[], Iterable[int]], least: float, window: float) -> None:
        self.processes, self.least, self.window = processes, least, window
        self.used, self.last = 0.0, {pid: _used(pid) for pid in processes()}
        self.looks = [(time.monotonic(), 0.0)]  # when, and what had been used by then

    def __call__(self) -> bool:
        """To be asked again and again, at least once in INTERVAL."""
        now = time.monotonic()
        if now - self.looks[-1][0] < min(INTERVAL, self.window / 4):
            return False
        each = {pid: _used(pid) for pid in self.processes()}
        # a process that has gone takes nothing back; threads are read a little after the whole, so
        # that what stands still may seem to go back, and only the sum of all looks is right
        self.used += sum(seconds - self.last.get(pid, 0.0) for pid, seconds in each.items())
        self.last = each
        self.looks.append((now, self.used))
        while self.looks[1][0] <= now - self.window:
            del self.looks[0]
        began, before = self.looks[0]
        return now - began >= self.window and self.used - before < self.least

    def __str__(self) -> str:
        return f"less than {self.least:g} CPU seconds in {self.window:g} s"
