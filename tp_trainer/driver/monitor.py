"""What the driver has seen of a run: its steps, its failures, and what they cost."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass

from tp_trainer.config import Config
from tp_trainer.driver.workers import Group
from tp_trainer.messages import (
    Alive,
    CheckpointFailed,
    CheckpointSaved,
    DataFound,
    Evaluated,
    FastPath,
    Message,
    ModelBuilt,
    Notice,
    SaveBegan,
    SaveReturned,
    StepDone,
    StepLogged,
    StepSkipped,
    TrainingBegan,
)
from tp_trainer.tracker import Outside
from tp_trainer.view import View, data_lines, path_line
from tp_trainer.watch import GRACE

CUT_OFF = "the workers ended while it was written"
LATE = 2 * GRACE  # seconds past a rank's own alarm after which the driver ends the workers itself


class Saves:
    """Which checkpoints were begun and are not there, over all restarts of the workers."""

    def __init__(self) -> None:
        self.under_way: set[int] = set()  # steps
        self.lost: dict[int, str] = {}  # step -> why

    def asked(self, step: int) -> None:
        self.under_way.add(step)

    def succeeded(self, step: int) -> None:
        """It counts; a step that is done again after a restart makes good for what failed there
        before."""
        self.under_way.discard(step)
        self.lost.pop(step, None)

    def failed(self, step: int, reason: str) -> None:
        self.under_way.discard(step)
        self.lost[step] = reason

    def cut_off(self) -> None:
        """The workers are gone: of what they were writing nothing more is heard."""
        for step in self.under_way:
            self.lost[step] = CUT_OFF
        self.under_way.clear()

    def missing(self, there: Callable[[int], bool]) -> dict[int, str]:
        """Those that are not there, in order. `there` looks whether what was cut off counts
        nevertheless."""
        return {
            step: why
            for step, why in sorted(self.lost.items())
            if why != CUT_OFF or not there(step)
        }


@dataclass(frozen=True)
class FailureCosts:
    """What the failures of a run cost; a part of summary.json, key for key. Times in seconds."""

    restarts: int
    failures: list[str]
    detection_seconds: list[float]  # from the last sign of life
    restart_seconds: list[float]  # from there to the first step that was done again
    steps_lost: int
    goodput: float


class RunMonitor:
    """What rank 0 has told of a run, over all restarts of its workers.

    `goodput` is the time of the steps that count (each optimizer step once, the time of its last
    doing; neither evaluation nor saving) over the wall time since the command began.
    """

    def __init__(self, config: Config, view: View, tracker: Outside) -> None:
        self.config, self.view, self.tracker = config, view, tracker
        self.saves = Saves()
        self.logged: StepLogged | None = None  # the last one
        self.model: str | None = None  # what is trained
        self.data: DataFound | None = None
        self.fast_paths: dict[str, FastPath] = {}
        self.leaner = True  # whether a leaner start would take fewer of them
        self.at_begin: Callable[[], None] = lambda: None  # called once the workers train
        self.validation_loss: float | None = None
        self.begun: float | None = None  # wall clock
        self.training = self.saving = False
        self.step = self.furthest = 0  # done last, and ever
        # the step before the first that was done, and the time of each since
        self.first, self.seconds = 0, array("d")
        self.sign = time.monotonic()  # the last sign of life
        # seconds within which the next one must come; None: unlimited
        self.limit: float | None = None
        # when the last failure was, until a step is done after it
        self.noticed: float | None = None
        self.restarts = self.steps_lost = self.in_a_row = self.passed = 0
        self.failures: list[str] = []
        self.detection_seconds: list[float] = []
        self.restart_seconds: list[float] = []

    def take(self, message: Message, age: float = 0.0) -> None:
        """Take what rank 0 pushed, `age` seconds ago."""
        self.sign = time.monotonic() - age
        match message:
            case Alive(limit):
                self.limit = limit
            case ModelBuilt(paths, leaner):
                self.leaner = leaner
                if paths != self.fast_paths:  # not after each restart
                    self.fast_paths = paths
                    self.say(path_line(paths))
            case TrainingBegan():
                self._began(message)
            case StepDone():
                self._stepped(message)
                self.view.update(message)
            case StepLogged() | Evaluated() | StepSkipped():
                if isinstance(message, StepLogged):
                    self.logged = message
                elif isinstance(message, Evaluated):
                    self.validation_loss = message.validation_loss
                self.tracker.log(asdict(message), message.step)
                self.view.update(message)
            case SaveBegan(step):
                self.saving = True
                self.saves.asked(step)
            case SaveReturned():
                self.saving = False
                self.tracker.flush()
            case CheckpointSaved(step):
                self.saves.succeeded(step)
                self.tracker.log(asdict(message), step)
            case CheckpointFailed(step, why):
                self.saves.failed(step, why)
                self.say(f"warning: the checkpoint of step {step} failed: {why}")
            case Notice(text):
                self.say(text)

    def _began(self, message: TrainingBegan) -> None:
        step, first_time = message.step, self.begun is None
        self.training, self.begun = True, self.begun or time.time()
        if message.data is not None and message.data != self.data:  # not after each restart
            self.say("\n".join([f"model: {message.model}", *data_lines(message.data)]))
        self.model, self.data = message.model, message.data
        world = self.config.parallelism.world_size
        self.view.start(message.total_steps, self.config, world, message.device)
        if self.restarts:
            self.say(f"workers restarted: going on from step {step}")
        elif step:
            self.say(f"resumed from step {step}")
        if first_time:
            self.at_begin()
        if first_time or step < self.first:
            self.first, self.seconds = step, array("d")
        self.steps_lost += max(0, self.step - step) if not first_time else 0
        del self.seconds[step - self.first :]
        self.step, self.furthest = step, max(self.furthest, step)

    def _stepped(self, done: StepDone) -> None:
        self.seconds.append(done.seconds)
        self.step, self.furthest = done.step, max(self.furthest, done.step)
        if self.noticed is not None:
            self.restart_seconds.append(round(self.sign - self.noticed, 2))
            self.noticed = None

    def say(self, text: str) -> None:
        self.view.say(text)

    @property
    def hung(self) -> bool:
        """Whether rank 0 has been silent for longer than it may."""
        return (
            self.training and self.limit is not None and time.monotonic() - self.sign > self.limit
        )

    def watch(self, group: Group) -> None:
        """End workers that their own alarms didn't: a stopped process hears none."""
        if (
            self.training
            and self.limit is not None
            and time.monotonic() - self.sign > self.limit + LATE
        ):
            group.kill()

    def ended(self) -> None:
        """Note that the workers are gone, for whatever reason."""
        self.training = self.saving = False
        self.limit = None
        self.saves.cut_off()

    def failed(self, line: str) -> None:
        """Note that they have failed, and why; the last sign of life says since when."""
        self.restarting()
        self.failures.append(line)
        self.in_a_row = 1 if self.furthest > self.passed else self.in_a_row + 1
        self.passed = max(self.passed, self.furthest)

    def restarting(self) -> None:
        self.noticed = time.monotonic()
        self.detection_seconds.append(round(self.noticed - self.sign, 2))

    def costs(self, began: float) -> FailureCosts:
        """What failures cost since the command began (wall clock)."""
        return FailureCosts(
            restarts=self.restarts,
            failures=self.failures,
            detection_seconds=self.detection_seconds,
            restart_seconds=self.restart_seconds,
            steps_lost=self.steps_lost,
            goodput=round(sum(self.seconds) / (time.time() - began), 4),
        )
