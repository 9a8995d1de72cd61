"""What ends a run from outside: SIGTERM, Ctrl-C, SIGHUP, SIGUSR1 and SIGUSR2 at the driver."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from tp_trainer.terminal import hung_up

# A closed terminal's, and what batch systems send ahead of time (Slurm's --signal): more than one
# may come of one cause, and SIGTERM follows.
NOTICES = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ONE_CAUSE = 0.5  # seconds in which a notice that comes again is the same


class Signals:
    """Signals at this process, in its main thread (they can be caught nowhere else).

    A signal ends the program at once, by SystemExit(128 + signal) or KeyboardInterrupt, unless
    `patient()` holds: then the first one is only noted, for whoever looks at `asked`, and a second
    one ends it. SIGTERM or Ctrl-C after a notice is no second one, nor a notice after any other.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.patient: Callable[[], bool] = lambda: False
        self.seen: dict[int, float] = {}  # kinds of what came, and when it came first

    def __call__(self, signum: int, frame: object) -> None:
        kind = signum if signum in NOTICES else signal.SIGTERM
        fresh, now = not self.seen, time.monotonic()
        first = self.seen.setdefault(kind, now)
        again = first < now - (ONE_CAUSE if kind in NOTICES else 0)
        if fresh and self.patient():
            self.asked = signum
        elif fresh or again:
            self.end(signum)

    def look(self) -> None:
        """A terminal that was closed, and of which no signal has told, as a SIGHUP."""
        heard = signal.getsignal(signal.SIGHUP) is self
        if heard and self.asked is None and hung_up():
            self(signal.SIGHUP, None)

    def end(self, signum: int) -> NoReturn:
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signum)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """While Ray starts it has a handler of its own, which exits with 15 or 1: this is wanted
        again after that. A notice that was ignored before (nohup) stays so.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        ignored = [each for each in NOTICES if signal.getsignal(each) == signal.SIG_IGN]
        before = {
            number: signal.signal(number, self)
            for number in (signal.SIGTERM, signal.SIGINT, *NOTICES)
            if number not in ignored
        }
        outer = before[signal.SIGTERM]
        if isinstance(outer, Signals):
            self.seen = outer.seen  # what is the second one to us is so to the outer one
        try:
            yield
        except SystemExit as end:
            if end.code == signal.SIGTERM:
                raise SystemExit(128 + signal.SIGTERM) from None
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def notices_blocked() -> Iterator[None]:
    """For the processes that are started in here, and theirs: who gets a signal may be the whole
    process group, and they would die of it. Another thread of this process takes it meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NOTICES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
