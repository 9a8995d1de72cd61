"""A run's state saved as checkpoints, shard by shard and in the background.

Every rank writes its own shards. A save stops the training for as long as a copy of the state
takes. A thread of each rank writes it and agrees with the others over a process group of its own;
the last of it, on rank 0, is what makes the checkpoint count.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from tp_trainer.checkpoint.files import local, write_files
from tp_trainer.checkpoint.layout import Stored, layout, render_metadata
from tp_trainer.checkpoint.manifest import Entry
from tp_trainer.checkpoint.ranks import RankFailed
from tp_trainer.checkpoint.requests import made_again
from tp_trainer.checkpoint.restoring import CheckpointReader
from tp_trainer.checkpoint.retention import keep
from tp_trainer.checkpoint.snapshot import Snapshot, Snapshots
from tp_trainer.checkpoint.state import RunState
from tp_trainer.checkpoint.store import Unknown, VerifiedCheckpoint, step_name
from tp_trainer.config import Unrecoverable


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the same on every rank. One line that says who failed, and
    why.
    """


class CantSave(SaveFailed, Unrecoverable):
    """Nor could another try write it: a full disk, a directory that may not be written to."""


@dataclass
class Saved:
    """How a save went."""

    step: int
    path: str | None = None  # None: it failed
    error: str | None = None
    lasts: bool = False  # the next one would fail the same
    notes: list[str] = field(default_factory=list)  # sentences for the user
    ended: bool = False
    pause_seconds: float = 0.0  # that this rank's training stood still
    seconds: float = 0.0  # from its beginning until it counted
    bytes: int = 0  # of all ranks


@dataclass(frozen=True)
class _Plan:
    """Who writes what: the same at every save."""

    signature: tuple[tuple[str, torch.Size, torch.dtype], ...]  # of this rank's tensors
    files: dict[str, list[str]]  # this rank's, with the names of the tensors in them
    tensors: dict[str, Stored]  # all ranks'


class Checkpoints(CheckpointReader):
    """Saves and restores one model and its optimizer. Every method but `done` and `wait` is called
    by all ranks together.
    """

    def __init__(
        self,
        run_dir: str,
        keep_last: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        keep_every: int | None = None,
        keep_best: int = 0,
        asynchronous: bool = True,
        permitted: Callable[[], bool] = lambda: True,
    ) -> None:
        """`permitted`: whether this run may still publish; asked on rank 0 before each checkpoint
        counts.
        """
        super().__init__(run_dir, model, optimizer, device)
        self.keep_last, self.keep_every, self.keep_best = keep_last, keep_every, keep_best
        self.permitted = permitted
        self.pauses: list[float] = []  # seconds, of every save
        self._snapshots = Snapshots(device, asynchronous)
        self._plan: _Plan | None = None
        self._thread: threading.Thread | None = None
        self._saves: list[Saved] = []  # that `done` hasn't told of
        self._told = False  # that saves are not in the background

    # ----------------------------------------------------------------------------------------------

    def save(self, state: RunState, last: bool = True) -> str | None:
        """Take a copy of everything and have it written; what became of it, `done` says.

        An earlier save that is still being written is waited for first.

        Args:
            state: for state.json; its world and device are filled in.
            last: wait until it counts.

        Returns:
            the checkpoint's path once it counts, None while it is being written.

        Raises:
            SaveFailed: `last` was given, and it doesn't count. On every rank.
        """
        began = time.perf_counter()
        self.wait()
        saved = Saved(state.step)
        self._saves.append(saved)
        tensors = self.tensors(with_rng=True)
        plan = self._planned(tensors)
        state = replace(state, world=dist.get_world_size(), device=self.device.type)
        snapshot: Snapshot | None = None
        problem: Exception | None = None
        try:
            snapshot = self._snapshots.take(
                {name: local(tensors[name]) for names in plan.files.values() for name in names}
            )
        except (RuntimeError, MemoryError) as error:  # the others must hear of it
            problem = error
        self._thread = threading.Thread(
            target=self._write,
            args=(saved, began, state, plan, snapshot or problem),
            name=f"save-{state.step}",
            daemon=True,
        )
        self._thread.start()
        if (
            snapshot is not None
            and snapshot.where == "none"
            and self._snapshots.asynchronous
            and not self._told
        ):
            saved.notes.append(
                "no room for a copy of the state: training waits until checkpoints are written"
            )
            self._told = True
        if last or snapshot is None or snapshot.where == "none":
            self._thread.join()
        saved.pause_seconds = time.perf_counter() - began
        self.pauses.append(saved.pause_seconds)
        if last and saved.path is None:
            raise (CantSave if saved.lasts else SaveFailed)(
                f"checkpoint of step {state.step} failed: {saved.error}"
            )
        return saved.path if last else None

    def prepare(self) -> None:
        """Agree on who writes what, ahead of the first save; once the optimizer has its state."""
        self._planned(self.tensors(with_rng=True))

    def wait(self, seconds: float | None = None) -> None:
        """Until nothing is being written, or so long."""
        if self._thread is not None:
            self._thread.join(seconds)
            if not self._thread.is_alive():
                self._thread = None

    def done(self) -> list[Saved]:
        """The saves that have ended since this was last asked."""
        done = [each for each in self._saves if each.ended]
        self._saves = [each for each in self._saves if not each.ended]
        return done

    def _planned(self, tensors: dict[str, torch.Tensor]) -> _Plan:
        """Who writes what into which file: agreed once, for as long as names, shapes and dtypes
        stay.
        """
        signature = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        if self._plan is None or self._plan.signature != signature:
            planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.set_up_planner(tensors, is_coordinator=dist.get_rank() == 0)
            # the same on every rank
            plans, _ = planner.create_global_plan(self.ranks.agree(planner.create_local_plan))
            files, stored = layout(plans)
            self._plan = _Plan(signature, files[dist.get_rank()], stored)
        return self._plan

    def _write(
        self,
        saved: Saved,
        began: float,
        state: RunState,
        plan: _Plan,
        source: Snapshot | Exception | None,
    ) -> None:
        """What the thread of a save does. Whatever goes wrong is in `saved`, on every rank."""
        try:
            saved.path, saved.bytes = self._written(saved, state, plan, source)
        except BaseException as error:  # a rank that is gone, too
            saved.error, saved.lasts = str(error), isinstance(error, RankFailed) and error.lasts
        finally:
            if isinstance(source, Snapshot):
                source.tensors.clear()
            saved.seconds = time.perf_counter() - began
            saved.ended = True

    def _written(
        self, saved: Saved, state: RunState, plan: _Plan, source: Snapshot | Exception | None
    ) -> tuple[str, int]:
        """Write all files and make the checkpoint count. Returns its path and bytes. Raises
        RuntimeError.
        """
        name, before = step_name(saved.step), made_again()
        found = self.ranks.on_first(lambda: self.store.check(name))
        if isinstance(found, VerifiedCheckpoint):
            damage = self.damage(found)
            if isinstance(damage, Unknown):
                raise RankFailed(f"{name} may be there already: {damage}")
            if damage is None:
                saved.notes.append(f"{name} is there already, and whole: it is kept as it is")
                return found.path, sum(entry.bytes for entry in found.files.values())
            saved.notes.append(f"{name} is there already, but damaged: it is written anew")
        there = isinstance(found, VerifiedCheckpoint)
        draft = self.ranks.on_first(
            lambda: self.store.begin(saved.step, replace=there, warn=saved.notes.append)
        )

        def write() -> dict[str, Entry]:
            if not isinstance(source, Snapshot):
                raise source or RuntimeError("no copy of the state")
            with source.reading():
                return write_files(
                    plan.files,
                    source.take,
                    lambda file: self.store.create(f"{draft}/{file}"),
                    _check_finite,
                )

        def commit() -> str:
            if not self.permitted():
                raise RuntimeError("the run's directory belongs to another process now")
            metadata, warn = render_metadata(plan.tensors), saved.notes.append
            return self.store.commit(draft, state, metadata, files, replace=there, warn=warn)

        try:
            files = {
                file: entry for part in self.ranks.agree(write) for file, entry in part.items()
            }
            path = self.ranks.on_first(commit)
        except RuntimeError:
            if dist.get_rank() == 0:
                self.store.discard(draft)  # every rank is done with it
            raise
        self.damaged.discard(name)
        if dist.get_rank() == 0:
            self._keep(name, saved.notes)
        if again := sum(self.ranks.agree(lambda: made_again() - before)):
            saved.notes.append(
                f"{name}: {again} requests to the storage failed and were made again"
            )
        return path, sum(entry.bytes for entry in files.values())

    def _keep(self, name: str, notes: list[str]) -> None:
        """Delete what the rules let go. The checkpoint just written counts, whatever becomes of
        that."""
        try:
            keep(
                self.store,
                self.keep_last,
                self.keep_every,
                self.keep_best,
                damaged=self.damaged,
                sure=name,
                warn=notes.append,
            )
        except Exception as error:  # every storage has its own
            notes.append(
                f"warning: old checkpoints could not be looked through ({error}); "
                "the next save tries again"
            )


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError where a weight is NaN or infinite."""
    # a sum shows it in one pass without a copy; that of finite numbers may overflow, so it is only
    # a suspicion
    if (
        name.startswith("model.")
        and not tensor.sum(dtype=torch.float32).isfinite()
        and not tensor.isfinite().all()
    ):
        raise ValueError(
            f"{name.removeprefix('model.')} is not finite; such a checkpoint would be of no use"
        )
