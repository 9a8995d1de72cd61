"""A rank's signs of life, without which it is ended."""

from __future__ import annotations

import os
import time

import ray
from ray.actor import ActorHandle

from tp_trainer.config import Config
from tp_trainer.messages import Alive, WorkerStarted
from tp_trainer.session.rank import Rank
from tp_trainer.watch import START, Alarm, came_to, stacks_file


class Watch:
    """Gives the signs of life of this rank: to its own alarm and, from rank 0, to the driver."""

    def __init__(self, config: Config, rank: Rank, launch: str, progress: ActorHandle) -> None:
        self.rank, self.seconds, self.progress = rank.rank, config.cluster.hang_seconds, progress
        self.alarm = Alarm(self.seconds, stacks_file(config.run_dir, launch, rank.rank))
        # whether the first step and the first pass of an evaluation are done
        self.trained = self.evaluated = False
        # what the driver was told last: when, and how long it may wait
        self.told, self.times = 0.0, 0.0
        context = ray.get_runtime_context()
        progress.push.remote(WorkerStarted(rank.rank, context.get_node_id(), os.getpid()))
        self.alive()

    def alive(self, times: float = 1) -> None:
        """Give a sign of life; `times` the set time is allowed until the next one."""
        times = times if self.trained else START
        self.alarm.alive(times)
        if self.rank == 0 and (times != self.times or time.monotonic() - self.told > 1):
            self.told, self.times = time.monotonic(), times
            limit = None if self.seconds is None else times * self.seconds
            self.progress.push.remote(Alive(limit))

    def forward(self, training: bool) -> None:
        """Called before each pass over the model."""
        self.alive(1 if training or self.evaluated else START)
        self.evaluated = self.evaluated or not training

    def stepped(self) -> None:
        self.trained = True
        came_to("training")
        self.alive()

    def off(self) -> None:
        self.alarm.off()
