"""A worker's watch over itself: SIGTERM as a wish to leave, and an alarm that ends a rank that
hangs, its stacks written.

Both work while the training thread is stuck in a collective: the alarm's two timers belong to a C
thread (the stacks) and to the kernel (the end), neither of which needs the interpreter.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Literal, TextIO

from tp_trainer.config import Stage

# how many times longer a rank may be silent until its first step is done, and in its first
# evaluation: compilers run then
START = 4
# seconds from the stacks to the end: the stacks of slower ranks must be written before their peers
# are gone
GRACE = 5.0

_told_to_leave = threading.Event()
# how far this process's training has come
_came: list[Literal["building", "first step", "training"]] = ["building"]


def hear_sigterm() -> None:
    """Take SIGTERM as a wish to leave; a second one ends the process. On its main thread."""

    def leave(signum: int, frame: object) -> None:
        _told_to_leave.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGALRM})


def told_to_leave() -> bool:
    return _told_to_leave.is_set()


def came_to(stage: Literal["building", "first step", "training"]) -> None:
    """Note how far this process has come, for what becomes of an error (`config.permanent`)."""
    _came[0] = stage


def stage(again: bool) -> Stage:
    """How far it has come; `again`: this command's workers have been restarted."""
    if _came[0] == "training" or not again:
        return _came[0]
    return "building again" if _came[0] == "building" else "first step again"


def stacks_file(run_dir: str, launch: str, rank: int | str) -> str | None:
    """Where a rank's stacks go; None where the run's directory is a URL: to the worker's stderr."""
    return None if "://" in run_dir else f"{run_dir}/stacks/{launch}-rank{rank}.txt"


class Alarm:
    """Ends this process when `alive` isn't called in time.

    Args:
        seconds: for which a rank may be silent; None: no alarm.
    """

    def __init__(self, seconds: float | None, path: str | None) -> None:
        self.seconds = seconds
        self.file: TextIO = sys.__stderr__ or sys.stderr
        self.path = Path(path) if path and seconds is not None else None
        if self.path is not None:
            self.path.parent.mkdir(exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")

    def alive(self, times: float = 1) -> None:
        """A sign of life. The next one must come within `times` the set time."""
        if self.seconds is not None:
            faulthandler.dump_traceback_later(times * self.seconds, file=self.file)
            signal.setitimer(signal.ITIMER_REAL, times * self.seconds + GRACE)

    def off(self) -> None:
        if self.seconds is not None:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self.path is not None:
            self.file.close()
            if not os.path.getsize(self.path):
                self.path.unlink()
                with suppress(OSError):  # the stacks of others are in it
                    self.path.parent.rmdir()
            self.path = None
