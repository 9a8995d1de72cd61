"""What the driver makes of what rank 0 pushes: rows to the tracker, saves that came to nothing."""

from __future__ import annotations

import asyncio
import io
from dataclasses import asdict
from typing import Any

from configs import TINY_RUN
from rich.console import Console

from tp_trainer.config import load
from tp_trainer.driver.monitor import CUT_OFF, RunMonitor
from tp_trainer.driver.workers import Progress
from tp_trainer.messages import (
    Alive,
    CheckpointFailed,
    CheckpointSaved,
    Evaluated,
    Message,
    Notice,
    SaveBegan,
    SaveReturned,
    StepDone,
    StepLogged,
    StepSkipped,
    TrainingBegan,
)
from tp_trainer.view import View

LOGGED = StepLogged(1, 0, 64, 2.0, 1.0, 1e-3, 10.0, 5.0, None, 0.5, 0.1)


class Tracker:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def log(self, row: dict[str, Any], step: int) -> None:
        self.calls.append((step, row))

    def flush(self) -> None:
        self.calls.append("flush")


def monitor() -> tuple[RunMonitor, Any, io.StringIO]:
    out, tracker = io.StringIO(), Tracker()
    made: Any = tracker
    return RunMonitor(load(TINY_RUN), View(Console(file=out)), made), tracker, out


def test_rows_reach_the_tracker_and_nothing_else_does() -> None:
    run, tracker, _ = monitor()
    messages: list[Message] = [
        TrainingBegan(0, 9, "cpu", "m", None),
        Alive(60),
        StepDone(1, 0.1),
        LOGGED,
        Evaluated(1, 3.0),
        StepSkipped(1, 1),
        Notice("something"),
        SaveBegan(1),
        SaveReturned(),
        CheckpointSaved(1, 0.1, 0.2, 7),
    ]
    for message in messages:
        run.take(message)
    saved = {"checkpoint_pause_seconds": 0.1, "checkpoint_seconds": 0.2, "checkpoint_bytes": 7}
    assert tracker.calls == [
        (1, asdict(LOGGED)),
        (1, {"step": 1, "validation_loss": 3.0}),
        (1, {"step": 1, "skipped_steps": 1}),
        "flush",
        (1, {"step": 1, **saved}),
    ]


def test_saves_that_are_not_there_are_named_over_all_restarts() -> None:
    """One that failed, one that the workers' death cut off, one that a later start of the workers
    made good."""
    run, _, out = monitor()

    def saves(step: int, *then: Message) -> None:
        for message in (SaveBegan(step), SaveReturned(), *then):
            run.take(message)

    saves(2, CheckpointFailed(2, "rank 0: OSError: 503"))
    saves(4, CheckpointSaved(4, 0.1, 0.2, 7))
    saves(6)
    run.ended()
    saves(6, CheckpointSaved(6, 0.1, 0.2, 7))
    saves(8)
    run.take(SaveBegan(10))
    run.ended()
    asked: list[int] = []

    def there(step: int) -> bool:
        asked.append(step)
        return step == 8

    assert run.saves.missing(there) == {2: "rank 0: OSError: 503", 10: CUT_OFF}
    assert asked == [8, 10], "only what was cut off may be there nevertheless"
    assert out.getvalue() == "warning: the checkpoint of step 2 failed: rank 0: OSError: 503\n"


def test_an_answer_that_came_too_late_is_asked_for_again() -> None:
    """The driver gives an answer up after ten seconds: the rows in it must not be gone."""

    async def play() -> list[list[Message]]:
        progress, seen = Progress(), []
        for step in (1, 2):
            await progress.push(Notice(str(step)))
        await progress.drain(0)  # nobody took it
        await progress.push(Notice("3"))
        for taken in (0, 3, 3):
            seen.append([message for message, _ in await progress.drain(taken)])
            if taken == 0:
                continue
            await progress.push(Notice("4"))
        return seen

    assert asyncio.run(play()) == [[Notice("1"), Notice("2"), Notice("3")], [], [Notice("4")]]
