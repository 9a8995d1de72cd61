"""The process that has the tracker. A line of JSON in is a request, a line out says how it went;
the driver feeds it.

    {"start": config}          the service is opened: which one, of which run
    {"log": row, "step": n}  {"flush": true}  {"summary": values}  {"close": true}

are answered by `{}`, or by `{"error": sentence, "at": request}`, after which the process ends:
another one may have more luck. It ends without exit hooks, since those of some clients wait for
their server. Nobody else reads or writes these two pipes: what a client prints goes to stderr, and
what it asks for on stdin it doesn't get.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
from contextlib import suppress
from typing import Any, TextIO

from tp_trainer.config import load
from tp_trainer.tracker.services import Request, Tracker, build_tracker

ORPHAN_SECONDS = 10.0  # that a tracker whose driver is gone may take to close


def main() -> None:
    """Serve until `close`, the first error, or the driver's end."""
    # Ctrl-C is for the driver, which has a summary to send yet; so is what a batch system sends
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    requests, answers = (
        os.fdopen(os.dup(0), encoding="utf-8"),
        os.fdopen(os.dup(1), "w", encoding="utf-8"),
    )
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    inbox: queue.SimpleQueue[Request] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, inbox), daemon=True).start()
    _serve(inbox, answers)
    os._exit(0)


def _read(requests: TextIO, inbox: queue.SimpleQueue[Request]) -> None:
    """What is asked for, into the inbox. Without a driver (it was killed) the tracker is closed,
    and not for long."""
    with suppress(ValueError):  # half a line
        for line in requests:
            inbox.put(json.loads(line))
    inbox.put({"close": True})
    time.sleep(ORPHAN_SECONDS)
    os._exit(1)


def _serve(inbox: queue.SimpleQueue[Request], answers: TextIO) -> None:
    tracker: Tracker | None = None
    while True:
        request = inbox.get()
        answer: dict[str, Any] = {}
        try:
            if "start" in request:
                config = load(request["start"])
                tracker = build_tracker(config, config.run_dir)
            elif tracker is not None:
                _do(tracker, request)
        except BaseException as error:  # of a foreign client: some end with SystemExit
            text = " ".join(str(error).split())
            if len(text) > 200:  # the cause often stands at the end
                text = f"{text[:100]} ... {text[-95:]}"
            answer = {"error": f"{type(error).__name__}: {text}", "at": next(iter(request))}
        with suppress(OSError):  # the driver is gone
            print(json.dumps(answer), file=answers, flush=True)
        if answer or "close" in request:
            return


def _do(tracker: Tracker, request: Request) -> None:
    if "log" in request:
        tracker.log(request["log"], request["step"])
    elif "flush" in request:
        tracker.flush()
    elif "summary" in request:
        tracker.summary(request["summary"])
    elif "close" in request:
        tracker.close()


if __name__ == "__main__":
    main()
