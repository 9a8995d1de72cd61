"""The driver's side of a tracker: a queue that takes everything at once, and a thread that feeds
the tracker's process from it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from tp_trainer.config import Config, plain
from tp_trainer.summary import Summary, TrackerError
from tp_trainer.tracker.services import Request, Row

# rows that wait for a tracker that doesn't take them; of more the oldest are given up
QUEUED = 10_000
# after which a silent tracker is spoken of: at its start, later
START_SECONDS, ANSWER_SECONDS = 60.0, 20.0
SILENT_SECONDS = 300.0  # after which it is ended, and another one started
# from a failure to the next start; the last one from then on
RETRY_SECONDS = (60.0, 120.0, 240.0, 480.0, 600.0)
END_SECONDS = 10.0  # that the end of the command waits for it
FAULTS = 2  # how often a row may be answered by an error before it is given up: it may be the row


class Outside:
    """A tracker that may fail, hang or die: no caller waits for it, but `finish`, END_SECONDS at
    most.

    Rows are delivered one by one, in their order. Those that can't be are kept for the next try
    (RETRY_SECONDS), in a process of its own that begins anew.

    Args:
        environment: of its process, above the driver's own: keys and tokens.
        say: takes a sentence for the user; called from another thread.
    """

    def __init__(
        self, config: Config, environment: Mapping[str, str], say: Callable[[str], None]
    ) -> None:
        self.kind, self.say = config.tracker.kind, say
        self.values = plain(config)
        # it is the process's environment; a tracker shows its configuration to everybody
        self.values["cluster"]["env"] = {}
        self.environment = dict(environment)
        self.queue: deque[Request] = deque()  # the first is the one that is being delivered
        self.changed = threading.Condition()
        self.closing = False
        self.step = self.given_up = self.faults = 0
        self.error: TrackerError | None = None  # for summary.json, once something has gone wrong
        self.troubled = self.recovered = False
        self.process: _Process | None = None
        self.thread = threading.Thread(target=self._feed, name="tracker", daemon=True)
        if self.kind != "none":
            self.thread.start()

    def log(self, row: Row, step: int) -> None:
        """Take a row."""
        self._put({"log": dict(row), "step": step})

    def flush(self) -> None:
        """Have what was logged brought to where it outlives this machine."""
        self._put({"flush": True})

    def finish(self, summary: Summary) -> TrackerError | None:
        """Give it the contents of summary.json and END_SECONDS to come to its end; then it is
        ended.

        Returns None, or what went wrong.
        """
        if self.kind == "none":
            return None
        with self.changed:
            self.queue.extend([{"summary": summary.copy()}, {"close": True}])
            self.closing = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join(END_SECONDS)
        if self.queue and self.error is None:
            self._note(f"not done {END_SECONDS:g} s after the end of the run")
        if self.process is not None:
            self.process.kill()
        if self.error is not None:
            self.error["lost_rows"] = self._lost()
        return self.error

    def leave(self) -> None:
        """The run has no end to speak of: it closes by itself, and nobody waits for it. After
        `finish` nothing is left to do."""
        with self.changed:
            if not self.closing:
                self.queue.clear()
                self.queue.append({"close": True})
                self.closing = True
                self.changed.notify()

    def _put(self, item: Request) -> None:
        if self.kind == "none":
            return
        with self.changed:
            if "flush" in item and self.queue and "flush" in self.queue[-1]:
                return
            if len(self.queue) >= QUEUED:
                self.given_up += "log" in self.queue[1]
                del self.queue[1]
            self.queue.append(item)
            self.changed.notify()

    def _lost(self) -> int:
        return self.given_up + sum("log" in item for item in list(self.queue))

    # ------------------------------------------------------------------------- in the thread, alone

    def _feed(self) -> None:
        """Deliver until `close` is done, or can't be."""
        tries = 0
        while True:
            try:
                # not before there is something to track: workers may yet refuse to train, and while
                # they start the processors have enough to do
                if "close" in self._next():
                    return
                self.process = _Process(self.environment)
                self._ask({"start": self.values}, START_SECONDS)
                while True:
                    item = self._next()
                    self._ask(item, ANSWER_SECONDS)
                    tries = 0
                    self._delivered(item)
                    if "close" in item:
                        return
            except _Failed as failed:
                if self.process is not None:
                    self.process.kill()
                if self.closing:
                    self._note(failed.reason)
                    return
                self._trouble(failed.reason)
                self._count_fault(failed)
                with self.changed:
                    self.changed.wait_for(
                        lambda: self.closing, RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)]
                    )
                tries += 1

    def _next(self) -> Request:
        with self.changed:
            self.changed.wait_for(lambda: self.queue)
            item = self.queue[0]
        self.step = item.get("step", self.step)
        return item

    def _delivered(self, item: Request) -> None:
        with self.changed:
            self.queue.popleft()
        self.faults = 0
        if self.troubled and "log" in item and not self.recovered:
            self.recovered = True
            self.troubled = False
            lost = (
                f"{self.given_up} rows were given up"
                if self.given_up
                else "it gets what it has missed"
            )
            self.say(f"tracker={self.kind} answers again: {lost}")

    def _count_fault(self, failed: _Failed) -> None:
        """A row that is refused again is given up: the others must not wait behind it for ever."""
        if failed.at not in ("log", "flush"):
            return
        self.faults += 1
        if self.faults >= FAULTS:
            self.faults = 0
            with self.changed:
                self.given_up += "log" in self.queue.popleft()

    def _ask(self, request: Request, seconds: float) -> None:
        """One request, until it is answered. Raises _Failed."""
        assert self.process is not None
        began = time.monotonic()
        self.process.send(request)
        while not self.process.answered(1.0):
            silent = time.monotonic() - began
            if silent > SILENT_SECONDS:
                raise _Failed(f"no answer for {SILENT_SECONDS:g} s")
            if silent > seconds:
                self._trouble(f"no answer for {seconds:g} s")
        self.process.take()

    def _trouble(self, reason: str) -> None:
        """Something is wrong: the user hears of it, once."""
        if self.troubled:
            return
        self.troubled = True
        if self.error is None:
            self.say(
                f"warning: tracker={self.kind} fails since step {self.step} ({reason}): "
                "training goes on without it, "
                "metrics.jsonl has everything; it is tried again now and then"
            )
        self._note(reason)

    def _note(self, reason: str) -> None:
        if self.error is None:
            self.error = {
                "tracker": self.kind,
                "reason": reason,
                "since_step": self.step,
                "lost_rows": 0,
            }


class _Failed(Exception):
    """The tracker's process answered with an error, or will answer no more."""

    def __init__(self, reason: str, at: str = "") -> None:
        super().__init__(reason)
        self.reason, self.at = reason, at


class _Process:
    """`tp_trainer.tracker.process` as a child: in a session of its own, so that a terminal's Ctrl-C
    isn't for it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        # it finds what this process finds, tp_trainer before all
        paths = os.pathsep.join(filter(None, sys.path))
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  # for as long as the process
        root = str(Path(__file__).resolve().parents[2])
        try:
            self.child = subprocess.Popen(
                [sys.executable, "-P", "-m", "tp_trainer.tracker.process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                bufsize=0,
                start_new_session=True,
                env={**os.environ, **environment, "PYTHONPATH": root + os.pathsep + paths},
            )
        except OSError as error:
            raise _Failed(f"its process can't be started ({error})") from error

    def send(self, request: Request) -> None:
        assert self.child.stdin is not None
        content = memoryview((json.dumps(request, default=str) + "\n").encode())
        try:
            while content.nbytes:
                content = content[self.child.stdin.write(content) :]
        except (OSError, ValueError):
            raise _Failed(self._last_words()) from None

    def answered(self, seconds: float) -> bool:
        """Whether there is an answer, or an end, within these seconds."""
        assert self.child.stdout is not None
        return bool(select.select([self.child.stdout], [], [], seconds)[0])

    def take(self) -> None:
        """The answer. Raises _Failed where it is an error or the process's end."""
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise _Failed(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise _Failed(answer["error"], answer["at"])

    def kill(self) -> None:
        """With all that it has started in its session."""
        if self.child.returncode is None:
            with suppress(OSError):
                os.killpg(self.child.pid, signal.SIGKILL)
        # one that a dead file system holds doesn't even hear that
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(1)

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.child.wait(1)
        with suppress(OSError):
            self.stderr.seek(-min(2000, self.stderr.seek(0, os.SEEK_END)), os.SEEK_END)
            if lines := self.stderr.read().decode(errors="replace").strip().splitlines():
                return f"its process has ended: {lines[-1][:200]}"
        return f"its process has ended with {self.child.returncode}"
