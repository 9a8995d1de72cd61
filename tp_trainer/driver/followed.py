"""What the driver has seen of a run: its steps, its failures, and what they cost."""

from __future__ import annotations

import time
from array import array
from typing import Any

from tp_trainer.config import Config
from tp_trainer.driver.workers import Group
from tp_trainer.view import View
from tp_trainer.watch import GRACE

LATE = 2 * GRACE  # seconds past a rank's own alarm after which the driver ends the workers itself


class Followed:
    """A run as rank 0 tells it, over all restarts of its workers.

    `goodput` is the time of the steps that count (each optimizer step once, the time of its last doing; neither
    evaluation nor saving) over the wall time since the command began.
    """

    def __init__(self, config: Config, view: View) -> None:
        self.config, self.view = config, view
        self.row: dict[str, Any] = {}
        self.validation_loss: float | None = None
        self.begun: float | None = None  # wall clock
        self.training = self.saving = False
        self.step = self.furthest = 0  # done last, and ever
        self.first, self.seconds = 0, array("d")  # the step before the first that was done, and the time of each since
        self.sign = time.monotonic()  # the last sign of life
        self.limit: float | None = None  # seconds within which the next one must come; None: unlimited
        self.noticed: float | None = None  # when the last failure was, until a step is done after it
        self.restarts = self.steps_lost = self.in_a_row = self.passed = 0
        self.failures: list[str] = []
        self.detection_seconds: list[float] = []
        self.restart_seconds: list[float] = []

    def take(self, item: dict[str, Any]) -> None:
        """What rank 0 pushed: signs of life, the beginning, steps, rows."""
        self.sign = time.monotonic() - item.pop("age", 0)
        if "alive" in item:
            self.limit = item["alive"]
        elif "saving" in item:
            self.saving = item["saving"]
        elif "begin" in item:
            self._begin(item)
        else:
            self.validation_loss = item.get("validation_loss", self.validation_loss)
            if "seconds" in item:
                self._stepped(item["step"], item["seconds"])
            if "loss" in item:
                self.row = item
            self.view.update(item)

    def _begin(self, item: dict[str, Any]) -> None:
        step, first_time = item["step"], self.begun is None
        self.training, self.begun = True, self.begun or time.time()
        self.view.start(item["begin"], self.config, self.config.parallelism.world_size, item["device"])
        if self.restarts:
            self.view.update({"event": f"workers restarted: going on from step {step}"})
        elif step:
            self.view.update({"event": f"resumed from step {step}"})
        if first_time or step < self.first:
            self.first, self.seconds = step, array("d")
        self.steps_lost += max(0, self.step - step) if not first_time else 0
        del self.seconds[step - self.first :]
        self.step, self.furthest = step, max(self.furthest, step)

    def _stepped(self, step: int, seconds: float) -> None:
        self.seconds.append(seconds)
        self.step, self.furthest = step, max(self.furthest, step)
        if self.noticed is not None:
            self.restart_seconds.append(round(self.sign - self.noticed, 2))
            self.noticed = None

    def say(self, text: str) -> None:
        self.view.update({"event": text})

    @property
    def hung(self) -> bool:
        """Whether rank 0 has been silent for longer than it may."""
        return self.training and self.limit is not None and time.monotonic() - self.sign > self.limit

    def watch(self, group: Group) -> None:
        """End workers that their own alarms didn't: a stopped process hears none."""
        if self.training and self.limit is not None and time.monotonic() - self.sign > self.limit + LATE:
            group.kill()

    def ended(self) -> None:
        """The workers are gone, whyever."""
        self.training = self.saving = False
        self.limit = None

    def failed(self, line: str) -> None:
        """They have failed: what it was, and how long ago the last sign of life is."""
        self.restarting()
        self.failures.append(line)
        self.in_a_row = 1 if self.furthest > self.passed else self.in_a_row + 1
        self.passed = max(self.passed, self.furthest)

    def restarting(self) -> None:
        self.noticed = time.monotonic()
        self.detection_seconds.append(round(self.noticed - self.sign, 2))

    def costs(self, began: float) -> dict[str, Any]:
        """The part of summary.json that says what failures cost."""
        return {
            "restarts": self.restarts, "failures": self.failures, "detection_seconds": self.detection_seconds,
            "restart_seconds": self.restart_seconds, "steps_lost": self.steps_lost,
            "goodput": round(sum(self.seconds) / (time.time() - began), 4),
        }  # fmt: skip
