"""A run's state in and out of a checkpoint, shard by shard, in the background and in any layout.

Every rank writes its own shards; another layout reads the slices that it needs. All that goes through torch's planners are
tensors, under `model.<parameter>`, `optim.<parameter>.<state>` and `rng.<rank>.<device>`; the rest is state.json.

A save stops the training for as long as a copy of the state takes. A thread of each rank writes it and agrees with the
others over a process group of its own; the last of it, on rank 0, is what makes the checkpoint count.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from tp_trainer.checkpoint.files import layout, local, read_metadata, read_tensors, write_files
from tp_trainer.checkpoint.manifest import Damaged, Entry
from tp_trainer.checkpoint.snapshot import Snapshot, Snapshots
from tp_trainer.checkpoint.store import Found, Store, at, step_name
from tp_trainer.config import ConfigError

T = TypeVar("T")
AGREE_SECONDS = 2 * 60 * 60  # that the first rank to have written waits for the last


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; the same on every rank. One line that says who failed, and why."""


@dataclass
class Saved:
    """How a save went."""

    step: int
    path: str | None = None  # None: it failed
    error: str | None = None
    notes: list[str] = field(default_factory=list)  # sentences for the user
    ended: bool = False
    pause_seconds: float = 0.0  # that this rank's training stood still
    seconds: float = 0.0  # from its beginning until it counted
    bytes: int = 0  # of all ranks


@dataclass(frozen=True)
class _Plan:
    """What is the same at every save."""

    signature: tuple[tuple[str, torch.Size, torch.dtype], ...]  # of this rank's tensors
    files: dict[str, list[str]]  # this rank's, with the names of the tensors in them
    metadata: dict[str, Any]


class Checkpoints:
    """Saves and restores one model and its optimizer. Every method but `done` and `wait` is called by all ranks together."""

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
        """`permitted`: whether this run may still publish; asked on rank 0 before each checkpoint counts."""
        self.store = Store(run_dir)
        self.keep_last, self.keep_every, self.keep_best = keep_last, keep_every, keep_best
        self.model, self.optimizer, self.device, self.permitted = model, optimizer, device, permitted
        self.pauses: list[float] = []  # seconds, of every save
        self._damaged: set[str] = set()  # names of checkpoints that a restore found damaged
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=AGREE_SECONDS))  # one thread at a time uses it
        self._snapshots = Snapshots(device, asynchronous)
        self._plan: _Plan | None = None
        self._thread: threading.Thread | None = None
        self._saves: list[Saved] = []  # that `done` hasn't told of
        self._told = False  # that saves are not in the background

    # --------------------------------------------------------------------------------------------------------- saving

    def save(self, step: int, state: dict[str, Any], last: bool = True) -> str | None:
        """Take a copy of everything and have it written; what became of it, `done` says.

        An earlier save that is still being written is waited for first.

        Args:
            state: for state.json: `step epoch offset tokens global_batch_size`, and what else is JSON.
            last: wait until it counts.

        Returns:
            the checkpoint's path once it counts, None while it is being written.

        Raises:
            SaveFailed: `last` was given, and it doesn't count. On every rank.
        """
        began = time.perf_counter()
        self.wait()
        saved = Saved(step)
        self._saves.append(saved)
        tensors = self._tensors(with_rng=True)
        plan = self._planned(tensors)
        state = {**state, "world": dist.get_world_size(), "device": self.device.type}
        snapshot: Snapshot | None = None
        problem: Exception | None = None
        try:
            snapshot = self._snapshots.take({name: local(tensors[name]) for names in plan.files.values() for name in names})
        except (RuntimeError, MemoryError) as error:  # the others must hear of it
            problem = error
        self._thread = threading.Thread(
            target=self._write, args=(saved, began, state, plan, snapshot or problem), name=f"save-{step}", daemon=True)  # fmt: skip
        self._thread.start()
        if snapshot is not None and snapshot.where == "none" and self._snapshots.asynchronous and not self._told:
            saved.notes.append("no room for a copy of the state: training waits until checkpoints are written")
            self._told = True
        if last or snapshot is None or snapshot.where == "none":
            self._thread.join()
        saved.pause_seconds = time.perf_counter() - began
        self.pauses.append(saved.pause_seconds)
        if last and saved.path is None:
            raise SaveFailed(f"checkpoint of step {step} failed: {saved.error}")
        return saved.path if last else None

    def prepare(self) -> None:
        """Agree on who writes what, ahead of the first save; once the optimizer has its state."""
        self._planned(self._tensors(with_rng=True))

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
        """Who writes what into which file: agreed once, for as long as names, shapes and dtypes stay."""
        signature = tuple((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items())
        if self._plan is None or self._plan.signature != signature:
            planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            planner.set_up_planner(tensors, is_coordinator=dist.get_rank() == 0)
            plans, _ = planner.create_global_plan(self._agree(planner.create_local_plan))  # the same on every rank
            files, content = layout(plans)
            self._plan = _Plan(signature, files[dist.get_rank()], content)
        return self._plan

    def _write(self, saved: Saved, began: float, state: dict[str, Any], plan: _Plan, source: Snapshot | Exception | None) -> None:
        """What the thread of a save does. Whatever goes wrong is in `saved`, on every rank."""
        try:
            saved.path, saved.bytes = self._written(saved, state, plan, source)
        except BaseException as error:  # a rank that is gone, too
            saved.error = str(error)
        finally:
            if isinstance(source, Snapshot):
                source.tensors.clear()
            saved.seconds = time.perf_counter() - began
            saved.ended = True

    def _written(self, saved: Saved, state: dict[str, Any], plan: _Plan, source: Snapshot | Exception | None) -> tuple[str, int]:
        """Write all files and make the checkpoint count. Returns its path and bytes. Raises RuntimeError."""
        name = step_name(saved.step)
        found = self._on_first(lambda: self.store.check(name))
        if isinstance(found, Found):
            if self.damage(found) is None:
                saved.notes.append(f"{name} is there already, and whole: it is kept as it is")
                return found.path, sum(entry.bytes for entry in found.files.values())
            saved.notes.append(f"{name} is there already, but damaged: it is written anew")
        replace = isinstance(found, Found)
        draft = self._on_first(lambda: self.store.begin(saved.step, replace=replace, warn=saved.notes.append))

        def write() -> dict[str, Entry]:
            if not isinstance(source, Snapshot):
                raise source or RuntimeError("no copy of the state")
            with source.reading():
                return write_files(plan.files, source.take, lambda file: self.store.write(draft, file), _check_finite)

        def commit() -> str:
            if not self.permitted():
                raise RuntimeError("the run's directory belongs to another process now")
            return self.store.commit(draft, saved.step, state, plan.metadata, files, replace=replace)

        try:
            files = {file: entry for part in self._agree(write) for file, entry in part.items()}
            path = self._on_first(commit)
        except RuntimeError:
            if dist.get_rank() == 0:
                self.store.discard(draft)  # every rank is done with it
            raise
        self._damaged.discard(name)
        self._on_first(lambda: self.store.keep(
            self.keep_last, self.keep_every, self.keep_best, damaged=self._damaged, sure=name, warn=saved.notes.append))  # fmt: skip
        return path, sum(entry.bytes for entry in files.values())

    # ------------------------------------------------------------------------------------------------------ restoring

    def newest(self, launch: str | None = None) -> tuple[Found | None, list[str]]:
        """The newest checkpoint that verifies (of this launch of the program, if given) and what was passed over: `name (why)`."""
        skipped: list[str] = []
        for name in reversed(self._on_first(self.store.step_names)):
            found = self._on_first(partial(self.store.check, name))
            if isinstance(found, Found) and launch is not None and found.state.get("launch") != launch:
                continue
            reason = found if isinstance(found, str) else self.damage(found)
            if reason is None:
                assert isinstance(found, Found)
                return found, skipped
            self._damaged.add(name)
            skipped.append(f"{name} ({reason})")
        return None, skipped

    def pinned(self, path: str) -> Found | str:
        """The checkpoint at a full path once it verifies, or why it doesn't count."""
        found = self._on_first(lambda: at(path))
        return found if isinstance(found, str) else self.damage(found) or found

    def damage(self, found: Found) -> str | None:
        """Read a checkpoint through, each rank its share: why it doesn't count, the same on every rank, or None."""
        files = sorted(found.files, key=lambda file: found.files[file].bytes, reverse=True)
        share = files[dist.get_rank() :: dist.get_world_size()]

        def look() -> str | None:
            reason = found.store.damage(found, share)
            if reason is None and dist.get_rank() == 0:
                try:
                    read_metadata(found)
                except Damaged as error:
                    return f"damaged: {error}"
            return reason

        return next((reason for reason in self._agree(look) if reason), None)

    def restore(self, found: Found) -> dict[str, Any]:
        """Load into the model and the optimizer, in any layout. Returns the checkpoint's state.json.

        Random number generators are restored where world size and device are the checkpoint's own.

        Raises:
            ConfigError: it has other tensors, shapes or dtypes; nothing was loaded.
            RuntimeError: it can't be read.
        """
        _create_optimizer_state(self.optimizer)
        same = found.state.get("world") == dist.get_world_size() and found.state.get("device") == self.device.type
        tensors = self._tensors(with_rng=same)

        def read() -> str | None:
            stored = read_metadata(found)
            have = {name: (each.shape, each.dtype) for name, each in stored.items() if not name.startswith("rng.") or name in tensors}
            want = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            wrong = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
            if wrong:
                each = [f"{name} is {_shown(have.get(name))} there and {_shown(want.get(name))} here" for name in wrong[:3]]
                return "; ".join(each) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
            read_tensors(found, stored, tensors)
            return None

        differs = next((answer for answer in self._agree(read) if answer), None)
        if differs:
            raise ConfigError("checkpoint.resume", found.path, f"its tensors are not those of this model and optimizer: {differs}")
        if same:
            rank = dist.get_rank()
            torch.set_rng_state(tensors[f"rng.{rank}.cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors[f"rng.{rank}.cuda"], self.device)
        return found.state

    # ------------------------------------------------------------------------------------------------------- together

    def _agree(self, action: Callable[[], T]) -> list[T]:
        """Run an action on every rank. Returns all results, or raises the same RuntimeError everywhere that any of them failed."""
        result, error = None, None
        try:
            result = action()
        except Exception as raised:
            error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:300]}"
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, (result, error), group=self._group)
        failed = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
        if failed:
            raise RuntimeError("; ".join(failed[:3]) + (f"; and {len(failed) - 3} more ranks" if len(failed) > 3 else ""))
        return [result for result, _ in answers]

    def _on_first(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0. Returns its result everywhere, or raises RuntimeError everywhere."""
        return self._agree(lambda: action() if dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]

    def _tensors(self, with_rng: bool) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optim.{name}.{key}"] = value
        if with_rng:
            tensors[f"rng.{dist.get_rank()}.cpu"] = torch.get_rng_state()
            if self.device.type == "cuda":
                tensors[f"rng.{dist.get_rank()}.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors


def stored_parameters(path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters in a checkpoint. Raises ConfigError where it is damaged."""
    try:
        stored = read_metadata(_found(path))
    except Damaged as error:
        raise ConfigError("checkpoint.path", path, f"damaged: {error}") from error
    return {name.removeprefix("model."): each.shape for name, each in stored.items() if name.startswith("model.")}


def read_parameters(path: str, parameters: dict[str, torch.Tensor]) -> None:
    """Fill whole tensors, by parameter name, from a checkpoint: in this process alone, in each one's own dtype.

    Raises:
        ConfigError: one of the files that they lie in is damaged.
    """
    found, tensors = _found(path), {f"model.{name}": tensor for name, tensor in parameters.items()}
    try:
        stored = read_metadata(found)
        reason = found.store.damage(found, sorted({chunk.file for name in tensors for chunk in stored[name].chunks}))
        if reason is not None:
            raise ConfigError("checkpoint.path", path, reason)
        read_tensors(found, stored, tensors)
    except Damaged as error:
        raise ConfigError("checkpoint.path", path, f"damaged: {error}") from error


def _found(path: str) -> Found:
    found = at(path)
    if isinstance(found, str):
        raise ConfigError("checkpoint.path", path, found)
    return found


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError where a weight is NaN or infinite."""
    # a sum shows it in one pass without a copy; that of finite numbers may overflow, so it is only a suspicion
    if name.startswith("model.") and not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
        raise ValueError(f"{name.removeprefix('model.')} is not finite; such a checkpoint would be of no use")


def _shown(tensor: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return f"{str(tensor[1]).removeprefix('torch.')} {list(tensor[0])}" if tensor else "missing"


def _create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """torch's optimizers have no state before their first step: take one with zero gradients and lr 0, which changes nothing."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
