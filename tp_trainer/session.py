"""A rank's dealings with what lies outside its training: its node, the other ranks, Ray, the driver, the trackers."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import ray.train
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.train import Checkpoint, CheckpointUploadMode

from tp_trainer.checkpoint.state import Checkpoints
from tp_trainer.checkpoint.store import Store, launch_file
from tp_trainer.config import Config, ConfigError
from tp_trainer.data import DataStream
from tp_trainer.loop import Hooks, Position
from tp_trainer.metrics import optimal_interval
from tp_trainer.parallel.agreement import LEAVE, SAVE, STOP
from tp_trainer.tracker import Tracker, build_tracker
from tp_trainer.watch import START, Alarm, stacks_file, told_to_leave

T = TypeVar("T")
FIRST_AUTO_SECONDS = 60.0  # at most, until checkpoint.interval=auto, which knows no pause yet, saves
LAST_SAVE_SECONDS = 60  # that a failed rank waits for the checkpoint it is writing


class Node:
    """This rank's place: its device, its node, and agreement with the other ranks."""

    def __init__(self, config: Config) -> None:
        context = ray.train.get_context()
        self.rank, self.local_rank = context.get_world_rank(), context.get_local_rank()
        self.local_world, self.storage = context.get_local_world_size(), context.get_storage()
        self.device = torch.device("cuda", torch.cuda.current_device()) if config.cluster.device == "gpu" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())  # of this thread; what runs on the default one can't be captured in a graph
            if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():  # as torchtitan: less is lost between blocks
                torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.local_world))
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def agree(self, action: Callable[[], T]) -> T:
        """Run an action on every rank; where any raised a ConfigError, every rank raises the first of them."""
        result, error = None, None
        try:
            result = action()
        except ConfigError as raised:
            error = (raised.key, raised.value, raised.message)
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        for each in errors:
            if each is not None:
                raise ConfigError(*each)
        return result  # type: ignore[return-value]  # set, since no rank raised

    def first(self, action: Callable[[], T]) -> T:
        """Run an action on the first rank of each node, then on its other ranks (they find what it made)."""
        result = self.agree(lambda: action() if self.local_rank == 0 else None)
        return result if self.local_rank == 0 else action()  # type: ignore[return-value]

    def check(self, config: Config, launch: str) -> None:
        """Raises ConfigError where this node can't take part."""
        if not Store(config.run_dir).exists(launch_file(launch)):
            raise ConfigError("checkpoint.storage_path", config.checkpoint.storage_path,
                              f"node {socket.gethostname()} doesn't see what the driver wrote there; give a path that all nodes share")
        if self.local_world % config.parallelism.tp:
            raise ConfigError("parallelism.tp", config.parallelism.tp,
                              f"node {socket.gethostname()} has {self.local_world} workers: a TP group must lie within one node")


class Watch:
    """The signs of life of this rank: to its own alarm and, from rank 0, to the driver."""

    def __init__(self, config: Config, node: Node, launch: str, progress: ActorHandle) -> None:
        self.rank, self.seconds, self.progress = node.rank, config.cluster.hang_seconds, progress
        self.alarm = Alarm(self.seconds, stacks_file(config.run_dir, launch, node.rank))
        self.trained = self.evaluated = False  # whether the first step and the first pass of an evaluation are done
        self.told, self.times = 0.0, 0.0  # what the driver was told last: when, and how long it may wait
        context = ray.get_runtime_context()
        progress.push.remote({"worker": node.rank, "node": context.get_node_id(), "pid": os.getpid()})
        self.alive()

    def alive(self, times: float = 1) -> None:
        """Something has gone on; `times` the set time is allowed until the next sign."""
        times = times if self.trained else START
        self.alarm.alive(times)
        if self.rank == 0 and (times != self.times or time.monotonic() - self.told > 1):
            self.told, self.times = time.monotonic(), times
            self.progress.push.remote({"alive": None if self.seconds is None else times * self.seconds})

    def forward(self, training: bool) -> None:
        """Called before each pass over the model."""
        self.alive(1 if training or self.evaluated else START)
        self.evaluated = self.evaluated or not training

    def stepped(self) -> None:
        self.trained = True
        self.alive()

    def off(self) -> None:
        self.alarm.off()


class Reporter:
    """The loop's hooks: rows to the tracker and the driver, checkpoints to storage and Ray, the profiler's trace."""

    def __init__(
        self, config: Config, node: Node, checkpoints: Checkpoints, data: DataStream, launch: str, progress: ActorHandle, watch: Watch
    ) -> None:
        self.config, self.node, self.checkpoints = config, node, checkpoints
        self.launch, self.progress, self.watch = launch, progress, watch
        self.data = {"global_batch_size": data.order.global_batch_size, "data": data.train.identity}  # for each state.json
        self.stop: Any = None  # rank 0: an answer of the driver's actor that comes when the run is to stop
        self.marked = 0.0  # when the step that runs began
        self.due = math.inf  # when checkpoint.interval=auto wants the next checkpoint
        self.tracker: Tracker | None = None
        self.profiler: torch.profiler.profile | None = None
        self.last_checkpoint: str | None = None
        self.failed_saves = 0

    def __enter__(self) -> Reporter:
        self.tracker = self.node.agree(lambda: build_tracker(self.config, self.config.run_dir) if self.node.rank == 0 else None)
        if self.config.train.profile.steps and self.node.rank == 0:
            self.profiler = _profiler(self.config)
            self.profiler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoints.wait(LAST_SAVE_SECONDS)  # after an error, too: the process ends, and with it what is being written
        self._tell_saves()
        if self.profiler is not None:
            self.profiler.stop()
        if self.tracker is not None:
            self.tracker.close()

    @property
    def hooks(self) -> Hooks:
        return Hooks(log=self.log, stepped=self.stepped, save=self._save, wishes=self.wishes)

    def begin(self, step: int, total_steps: int) -> None:
        """Tell the driver that training begins."""
        self._push({"begin": total_steps, "step": step, "device": self.node.device.type})
        if self.node.rank == 0:
            self.stop = self.progress.stopping.remote()
        self.marked = time.perf_counter()
        self.due = self.marked + self._auto_seconds([1.0])

    def log(self, row: dict[str, Any]) -> None:
        if self.tracker is not None:
            self.tracker.log(row, row["step"])
        self._push(row)
        if "validation_loss" in row:  # what came before it was no step
            self.marked = time.perf_counter()

    def stepped(self, step: int) -> None:
        if not self.watch.trained:  # the first step takes long anyway
            self.checkpoints.prepare()
        self.watch.stepped()
        now = time.perf_counter()
        self._push({"step": step, "seconds": now - self.marked})
        self.marked = now
        self._tell_saves()
        if self.profiler is not None:
            self.profiler.step()

    def wishes(self) -> int:
        """What this rank has been asked for: SIGTERM means to leave; rank 0 hears when the driver is to stop, and has the clock."""
        due = self.node.rank == 0 and self.config.checkpoint.interval == "auto" and time.perf_counter() > self.due
        stop = self.stop is not None and bool(ray.wait([self.stop], timeout=0)[0])
        return (STOP if stop else 0) | (LEAVE if told_to_leave() else 0) | (SAVE if due else 0)

    def _save(self, *arguments: Any, **more: Any) -> None:
        """A save as the loop asks for it: before and after it, a sign of life."""
        self.watch.alive()
        self._push({"saving": True})
        self.save(*arguments, **more)
        self._push({"saving": False})
        self.watch.alive()
        self.marked = time.perf_counter()

    def save(self, position: Position, validation_loss: float | None, last: bool) -> None:
        """A checkpoint of all ranks, written in the background; the last one is waited for and made known to Ray Train.

        Raises:
            SaveFailed: the last one doesn't count. An earlier one that failed is told of, and training goes on.
        """
        state = {
            "step": position.step, "epoch": position.cursor.epoch, "offset": position.cursor.offset, "tokens": position.tokens,
            **self.data, "seed": self.config.seed, "launch": self.launch,
            "layout": self.config.parallelism.layout,
            "validation_loss": validation_loss if validation_loss is not None and math.isfinite(validation_loss) else None,
            "guard": position.guard,
        }  # fmt: skip
        self.due = math.inf  # until it is known how this one went
        try:
            self.checkpoints.save(position.step, state, last)
        finally:
            self._tell_saves()
        if self.tracker is not None:
            self.tracker.flush()
        if not last or self.last_checkpoint is None:
            return
        name = self.last_checkpoint.rsplit("/", 1)[-1]
        ray.train.report(
            {"step": position.step, "validation_loss": validation_loss},
            checkpoint=Checkpoint(f"{self.node.storage.experiment_fs_path}/{name}", self.node.storage.storage_filesystem),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )

    def _auto_seconds(self, pauses: list[float]) -> float:
        seconds = optimal_interval(pauses, self.config.checkpoint.mtbf_hours * 3600)
        return seconds if self.checkpoints.pauses else min(seconds, FIRST_AUTO_SECONDS)

    def _tell_saves(self) -> None:
        """Of the saves that have ended since: a row of what they took, a sentence about what went wrong."""
        for saved in self.checkpoints.done():
            for note in saved.notes:
                self._push({"event": note})
            self.due = time.perf_counter() + FIRST_AUTO_SECONDS
            if saved.path is None:
                self.failed_saves += 1
                self._push({"event": f"warning: the checkpoint of step {saved.step} failed: {saved.error}"})
                continue
            self.last_checkpoint = saved.path
            # the next is not to wait for this one
            self.due = time.perf_counter() + max(self._auto_seconds(self.checkpoints.pauses), 2 * saved.seconds)
            if self.tracker is not None:
                self.tracker.log({
                    "step": saved.step, "checkpoint_pause_seconds": saved.pause_seconds, "checkpoint_seconds": saved.seconds,
                    "checkpoint_bytes": saved.bytes,
                }, saved.step)  # fmt: skip

    def _push(self, item: dict[str, Any]) -> None:
        """To the driver, without waiting."""
        if self.node.rank == 0:
            self.progress.push.remote(item)


def _profiler(config: Config) -> torch.profiler.profile:
    """A profiler of `train.profile.steps` steps of rank 0, its Chrome trace in <run>/profile."""
    folder = f"{config.run_dir}/profile" if "://" not in config.run_dir else os.path.abspath("profile")
    os.makedirs(folder, exist_ok=True)
    schedule = torch.profiler.schedule(wait=config.train.profile.start, warmup=1, active=config.train.profile.steps, repeat=1)
    return torch.profiler.profile(schedule=schedule, on_trace_ready=lambda p: p.export_chrome_trace(f"{folder}/rank0.json"))
