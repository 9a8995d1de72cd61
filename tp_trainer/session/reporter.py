"""What a rank reports of its training: rows, checkpoints, and the profiler's trace."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import Checkpoint, CheckpointUploadMode

from tp_trainer.checkpoint.saving import Checkpoints
from tp_trainer.checkpoint.state import RunState
from tp_trainer.config import Config
from tp_trainer.data import DataStream
from tp_trainer.loop import Hooks, Position
from tp_trainer.messages import (
    CheckpointFailed,
    CheckpointSaved,
    Evaluated,
    Notice,
    SaveBegan,
    SaveReturned,
    StepDone,
    StepLogged,
    StepSkipped,
    TrainingBegan,
)
from tp_trainer.metrics import optimal_interval
from tp_trainer.parallel.agreement import LEAVE, SAVE, STOP
from tp_trainer.session.profile import profiler
from tp_trainer.session.rank import Rank
from tp_trainer.session.signs import Watch
from tp_trainer.tracker import MetricsFile
from tp_trainer.watch import came_to, told_to_leave

SLOW_SAVE_SECONDS = 10.0  # a save that takes longer is spoken of
# at most, until checkpoint.interval=auto, which knows no pause yet, saves
FIRST_AUTO_SECONDS = 60.0
LAST_SAVE_SECONDS = 60  # that a failed rank waits for the checkpoint it is writing


class Reporter:
    """The loop's hooks: rows to the tracker and the driver, checkpoints to storage and Ray, the
    profiler's trace.
    """

    def __init__(
        self,
        config: Config,
        rank: Rank,
        checkpoints: Checkpoints,
        data: DataStream,
        launch: str,
        progress: ActorHandle,
        watch: Watch,
    ) -> None:
        self.config, self.rank, self.checkpoints = config, rank, checkpoints
        self.launch, self.progress, self.watch = launch, progress, watch
        self.data_found = data.found
        # for each state.json; the digest reads the tokens
        self.order, self.tokens = data.order, data.train.identity
        # rank 0: an answer of the driver's actor that comes when the run is to stop
        self.stop: Any = None
        self.marked = 0.0  # when the step that runs began
        self.due = math.inf  # when checkpoint.interval=auto wants the next checkpoint
        self.metrics: MetricsFile | None = None  # rank 0's; a tracker is the driver's
        # whether it has been told that metrics.jsonl doesn't reach its place
        self.metrics_late = False
        self.profiler: torch.profiler.profile | None = None
        self.last_checkpoint: str | None = None

    def __enter__(self) -> Reporter:
        self.metrics = self.rank.agree(
            lambda: MetricsFile(self.config.run_dir) if self.rank.rank == 0 else None
        )
        if self.config.train.profile.steps and self.rank.rank == 0:
            self.profiler = profiler(self.config, self.tell)
            self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        # after an error, too: the process ends, and with it what is being written
        self.checkpoints.wait(LAST_SAVE_SECONDS)
        self._tell_saves()
        if self.profiler is not None:
            self.profiler.stop()
        if self.metrics is not None:
            self.metrics.close()

    @property
    def hooks(self) -> Hooks:
        return Hooks(log=self.log, stepped=self.stepped, save=self._save, wishes=self.wishes)

    def tell(self, sentences: Sequence[str]) -> None:
        """Say something to the user."""
        for each in sentences:
            self.rank.push(self.progress, Notice(each))

    def begin(self, step: int, total_steps: int, model: str) -> None:
        """Tell the driver that training begins, of which model and on which data."""
        came_to("first step")
        device, found = self.rank.device.type, self.data_found
        self.rank.push(self.progress, TrainingBegan(step, total_steps, device, model, found))
        if self.rank.rank == 0:
            self.stop = self.progress.stopping.remote()
        self.marked = time.perf_counter()
        self.due = self.marked + self._auto_seconds([1.0])

    def log(self, row: StepLogged | Evaluated | StepSkipped) -> None:
        """Take a row of metrics.jsonl, as the loop makes them."""
        if self.metrics is not None:
            self.metrics.log(asdict(row), row.step)
        self.rank.push(self.progress, row)
        if isinstance(row, Evaluated):  # what came before it was no step
            self.marked = time.perf_counter()

    def stepped(self, step: int) -> None:
        if not self.watch.trained:  # the first step takes long anyway
            self.checkpoints.prepare()
        self.watch.stepped()
        now = time.perf_counter()
        self.rank.push(self.progress, StepDone(step, now - self.marked))
        self.marked = now
        self._tell_saves()
        if self.profiler is not None:
            self.profiler.step()

    def wishes(self) -> int:
        """What this rank has been asked for: SIGTERM means to leave; rank 0 hears when the driver
        is to stop, and has the clock.
        """
        due = (
            self.rank.rank == 0
            and self.config.checkpoint.interval == "auto"
            and time.perf_counter() > self.due
        )
        stop = self.stop is not None and bool(ray.wait([self.stop], timeout=0)[0])
        if stop:
            ray.get(self.stop)  # raises where the driver's actor is gone: that is no wish to stop
        return (STOP if stop else 0) | (LEAVE if told_to_leave() else 0) | (SAVE if due else 0)

    def _save(self, position: Position, validation_loss: float | None, last: bool) -> None:
        """A save as the loop asks for it: before and after it, a sign of life."""
        self.watch.alive()
        self.rank.push(self.progress, SaveBegan(position.step))
        self.save(position, validation_loss, last)
        self.rank.push(self.progress, SaveReturned())
        self.watch.alive()
        self.marked = time.perf_counter()

    def save(self, position: Position, validation_loss: float | None, last: bool) -> None:
        """A checkpoint of all ranks, written in the background; the last one is waited for and made
        known to Ray Train.

        Raises:
            SaveFailed: the last one doesn't count. An earlier one that failed is told of, and
                training goes on.
        """
        finite = validation_loss is not None and math.isfinite(validation_loss)
        state = RunState(
            step=position.step,
            epoch=position.cursor.epoch,
            offset=position.cursor.offset,
            tokens=position.tokens,
            global_batch_size=self.order.global_batch_size,
            data=self.tokens,
            seq_length=self.config.data.seq_length,
            seed=self.config.seed,
            launch=self.launch,
            layout=self.config.parallelism.layout,
            validation_loss=validation_loss if finite else None,
            guard=dict(position.guard),
            schedule=asdict(position.schedule) if position.schedule else None,
        )
        self.due = math.inf  # until it is known how this one went
        try:
            self.checkpoints.save(state, last)
        finally:
            self._tell_saves()
        if self.metrics is not None:
            self.metrics.flush()
            if self.metrics.problem is not None and not self.metrics_late:
                self.metrics_late = True
                self.tell(
                    [
                        f"warning: metrics.jsonl doesn't reach {self.config.run_dir} "
                        f"({self.metrics.problem}); "
                        "it is tried again at each checkpoint and at the end"
                    ]
                )
        if not last or self.last_checkpoint is None:
            return
        name = self.last_checkpoint.rsplit("/", 1)[-1]
        ray.train.report(
            {"step": position.step, "validation_loss": validation_loss},
            checkpoint=Checkpoint(
                f"{self.rank.storage.experiment_fs_path}/{name}",
                self.rank.storage.storage_filesystem,
            ),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def _auto_seconds(self, pauses: list[float]) -> float:
        seconds = optimal_interval(pauses, self.config.checkpoint.mtbf_hours * 3600)
        return seconds if self.checkpoints.pauses else min(seconds, FIRST_AUTO_SECONDS)

    def _tell_saves(self) -> None:
        """Of the saves that have ended since: a row of what they took, a sentence about what went
        wrong.
        """
        for saved in self.checkpoints.done():
            self.tell(saved.notes)
            self.due = time.perf_counter() + FIRST_AUTO_SECONDS
            if saved.path is None:
                self.rank.push(self.progress, CheckpointFailed(saved.step, str(saved.error)))
                continue
            self.last_checkpoint = saved.path
            if saved.seconds > SLOW_SAVE_SECONDS:
                self.tell(
                    [
                        f"the checkpoint of step {saved.step} took {saved.seconds:.0f} s to"
                        f" write (training stood still for {saved.pause_seconds:.1f} s of them)"
                    ]
                )
            # the next is not to wait for this one
            self.due = time.perf_counter() + max(
                self._auto_seconds(self.checkpoints.pauses), 2 * saved.seconds
            )
            row = CheckpointSaved(saved.step, saved.pause_seconds, saved.seconds, saved.bytes)
            self.rank.push(self.progress, row)
            if self.metrics is not None:
                self.metrics.log(asdict(row), saved.step)
