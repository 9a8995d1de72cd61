"""The learning rate as a function of the step, over resumes that make a run longer or shorter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from tp_trainer.config import ConfigError, Optim


@dataclass(frozen=True)
class Schedule:
    """A run's learning rate from the first step to the last, in parts of its peak.

    Checkpoints keep it.

    Linear warm-up, then, from `start` to the floor at the last step: cosine (Loshchilov & Hutter
    2017), linear, constant, or warm-up-stable-decay (Hu et al. 2024, arXiv:2404.06395). Steps are
    counted from 0.
    """

    shape: str  # optim.schedule
    floor: float  # part of the peak at the last step
    total: int  # steps of the run
    warmup: int  # steps, fixed at the run's first start
    decay: int  # wsd: the last steps, in which it falls
    start: int  # from where it falls: the warm-up's end, or the last resume of another length
    part: float = 1.0  # of the peak, at `start`

    @classmethod
    def of(cls, optim: Optim, total: int) -> Schedule:
        """That of a run of `total` steps, from its beginning."""
        warmup = optim.warmup_steps if optim.warmup_steps is not None else total // 20
        return cls(optim.schedule, optim.min_lr_ratio, total, warmup, _decay(optim, total), warmup)

    @classmethod
    def stored(cls, values: Any) -> Schedule | None:
        """The one in a state.json; None where it holds none, as of earlier releases."""
        kinds = {name: type(value) for name, value in asdict(cls("", 0.0, 0, 0, 0, 0)).items()}
        if not isinstance(values, Mapping) or values.keys() != kinds.keys():
            return None
        with suppress(TypeError, ValueError):
            return cls(**{name: kinds[name](value) for name, value in values.items()})
        return None

    def resumed(self, optim: Optim, step: int, total: int) -> Schedule:
        """That of this run once it has done `step` steps and is to have `total`.

        Itself where nothing has changed. The warm-up stays. After it the rate goes from what it
        would have been at `step` to the floor at the new end. Where `optim` is of another schedule
        (checkpoint.allow_mismatch), it is that one's, as from the run's beginning.

        Raises:
            ConfigError: the new end comes before that of the warm-up.
        """
        if self.differs(optim):
            return Schedule.of(optim, total)
        if total == self.total:
            return self
        if total < self.warmup:
            raise ConfigError(
                "train.max_steps",
                total,
                f"the warm-up takes {self.warmup} steps, as at the run's "
                "first start; give a run of at least that many",
            )
        start = max(step, self.warmup)
        part = learning_rate(self, 1.0, start) if start > self.start else self.part
        return replace(
            self, total=total, decay=_decay(optim, total), start=max(start, self.start), part=part
        )

    def differs(self, optim: Optim) -> bool:
        """Whether `optim` asks for another schedule than this."""
        typed = [
            (optim.schedule, self.shape),
            (optim.min_lr_ratio, self.floor),
            (optim.warmup_steps, self.warmup),
        ]
        typed += [(optim.decay_steps, self.decay)] if self.shape == "wsd" else []
        return any(asked not in (None, mine) for asked, mine in typed)

    def describe(self, peak: float, step: int) -> str:
        """From where it goes to where, once `step` steps are done."""
        begins, ends = learning_rate(self, peak, step), learning_rate(self, peak, self.total - 1)
        return f"from step {step} at {begins:.2e} to {ends:.2e} at step {self.total}"


def _decay(optim: Optim, total: int) -> int:
    return optim.decay_steps if optim.decay_steps is not None else total // 10


def learning_rate(schedule: Schedule, peak: float, step: int) -> float:
    """The learning rate of step `step` (0 is the first); after the last step, that of the last."""
    if step < schedule.warmup:
        return peak * (step + 1) / schedule.warmup
    if schedule.shape == "constant":
        return peak * schedule.part
    start = schedule.start
    if schedule.shape == "wsd":
        start = max(start, schedule.total - schedule.decay)
    if step < start:
        return peak * schedule.part
    way = min(1.0, (step - start) / max(1, schedule.total - 1 - start))
    shape = 0.5 * (1 + math.cos(math.pi * way)) if schedule.shape == "cosine" else 1 - way
    return peak * (schedule.floor + (schedule.part - schedule.floor) * shape)
