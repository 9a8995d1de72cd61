"""How a run ends before its time: its last step and checkpoint, and the command that goes on."""

from __future__ import annotations

import json
import os
import shlex
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from tp_trainer.checkpoint.store import Store, VerifiedCheckpoint
from tp_trainer.closing import summary_lines
from tp_trainer.config import COMMAND, RUN_LENGTH, Config
from tp_trainer.driver.monitor import RunMonitor
from tp_trainer.summary import Summary
from tp_trainer.view import View


@dataclass(frozen=True)
class Place:
    """How far a run has come and how to go on; a part of summary.json, key for key."""

    steps: int
    checkpoint: str | None  # the last one's path
    resume_command: str | None


class Ending:
    """What is said, and left in summary.json, of a run that was stopped, failed or was refused.

    Attributes:
        monitor: what the driver has seen of it, once there are workers.
        cleared: whether what the directory holds is this run's own: `checkpoint.resume=never` has
            set aside what was there.
        told: whether it has been said already.
    """

    def __init__(self, config: Config, store: Store, view: View, began: float) -> None:
        self.config, self.store, self.view, self.began = config, store, view, began
        self.monitor: RunMonitor | None = None
        self.cleared = config.checkpoint.resume != "never"
        self.told = False

    def command(self) -> str | None:
        """The user's own command, for a shell, but that it doesn't start over; None without one."""
        words = [str(word) for word in json.loads(os.environ.get(COMMAND, "[]"))]
        if words and self.cleared and self.config.checkpoint.resume == "never":
            words = [word for word in words if not word.startswith("checkpoint.resume=")] + [
                "checkpoint.resume=auto"
            ]
        return shlex.join(words) or None

    def newest(self) -> VerifiedCheckpoint | None:
        """The last checkpoint of the run, as far as sizes tell."""
        if self.cleared:
            with suppress(Exception):  # every file system has its own
                return self.store.newest()[0]
        return None

    def place(self) -> Place:
        """How far the run has come, as the workers have told or its directory shows."""
        found = self.newest()
        if self.monitor is not None and self.monitor.begun is not None:
            steps = self.monitor.step
        else:
            steps = found.step if found else 0
        return Place(steps, found.path if found else None, self.command())

    def early(self, status: Literal["stopped", "refused"], leave: bool = True) -> None:
        """Say it of a run whose workers gave no answer; where `leave`, in summary.json too.

        That of a finished run stays.
        """
        if self.told:
            return
        self.told = True
        place = self.place()
        summary: Summary = {
            "status": status,
            "steps": place.steps,
            "checkpoint": place.checkpoint,
            "resume_command": place.resume_command,
            "wall_seconds": time.time() - self.began,
            "run_dir": self.config.run_dir,
            "run_length": {name: getattr(self.config.train, name) for name in RUN_LENGTH},
            "tracker": self.config.tracker.kind,
        }
        with suppress(Exception):
            before = self.store.read_json("summary.json") or {}
            if leave and self.cleared and before.get("status") != "finished":
                self.store.write_json("summary.json", summary)
        self.view.close()
        self.view.say(summary_lines(summary))

    def interrupted(self, error: BaseException | None) -> None:
        """Called as the run's directory is given back, with what has ended the run or None."""
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self.early("stopped", leave=self.monitor is None or self.monitor.begun is None)
