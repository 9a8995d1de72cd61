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


def _stat(pid: int | str) -> list[str]:
    """/proc's fields from the state on; none of a process that is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def cpu_seconds(pids: Iterable[int]) -> float:
    """What these have used, and those of their children that have ended."""
    stats = (_stat(pid) for pid in pids)
    return sum(int(ticks) for stat in stats for ticks in stat[11:15]) / TICK


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
        self.used, self.last = 0.0, cpu_seconds(processes())
        self.looks = [(time.monotonic(), 0.0)]  # when, and what had been used by then

    def __call__(self) -> bool:
        """To be asked again and again, at least once in INTERVAL."""
        now = time.monotonic()
        if now - self.looks[-1][0] < min(INTERVAL, self.window / 4):
            return False
        total = cpu_seconds(self.processes())
        self.used += max(0.0, total - self.last)  # less: one has gone, with what it used
        self.last = total
        self.looks.append((now, self.used))
        while self.looks[1][0] <= now - self.window:
            del self.looks[0]
        began, before = self.looks[0]
        return now - began >= self.window and self.used - before < self.least

    def __str__(self) -> str:
        return f"less than {self.least:g} CPU seconds in {self.window:g} s"
