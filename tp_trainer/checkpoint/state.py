"""A run's state in and out of a checkpoint directory, shard by shard, through torch.distributed.checkpoint.

Every rank writes its own shards; another layout reads the slices that it needs. All that goes through DCP are
tensors, under `model.<parameter>`, `optim.<parameter>.<state>` and `rng.<rank>.<device>`; the rest is state.json.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from tp_trainer.checkpoint.store import Found, Store, step_name
from tp_trainer.config import ConfigError


class Checkpoints:
    """Saves and restores one model and its optimizer. Every method is called by all ranks together."""

    def __init__(self, run_dir: str, keep_last: int, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.store = Store(run_dir)
        self.keep_last = keep_last
        self.model, self.optimizer, self.device = model, optimizer, device

    def save(self, step: int, state: dict[str, Any]) -> str:
        """Write everything; the checkpoint counts once the manifest is there. Returns its path."""
        if dist.get_rank() == 0:
            self.store.begin(step)
        dist.barrier()
        path = f"{self.store.run_dir}/{step_name(step)}"
        dcp.save(self._tensors(with_rng=True), storage_writer=_writer(path))
        if dist.get_rank() == 0:
            self.store.commit(step, {**state, "world": dist.get_world_size(), "device": self.device.type})
            self.store.keep_last(self.keep_last)
        dist.barrier()
        return path

    def restore(self, found: Found) -> dict[str, Any]:
        """Load into the model and the optimizer, in any layout. Returns the checkpoint's state.json.

        Random number generators are restored where world size and device are the checkpoint's own.
        """
        _create_optimizer_state(self.optimizer)
        same = found.state.get("world") == dist.get_world_size() and found.state.get("device") == self.device.type
        tensors = self._tensors(with_rng=same)
        dcp.load(tensors, storage_reader=_reader(found.path))
        if same:
            rank = dist.get_rank()
            torch.set_rng_state(tensors[f"rng.{rank}.cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors[f"rng.{rank}.cuda"], self.device)
        return found.state

    def _tensors(self, with_rng: bool) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optim.{name}.{key}"] = value
        if with_rng:
            tensors[f"rng.{dist.get_rank()}.cpu"] = torch.get_rng_state()
            if self.device.type == "cuda":
                tensors[f"rng.{dist.get_rank()}.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors


def stored_parameters(path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's parameters in a checkpoint."""
    try:
        stored = _reader(path).read_metadata().state_dict_metadata
    except Exception as error:  # DCP's metadata are pickled classes, which change between releases
        why = f"torch {torch.__version__} can't read it, was it written by another release? ({error})"
        raise ConfigError("checkpoint", path, why) from error
    return {key.removeprefix("model."): tuple(each.size) for key, each in stored.items()
            if key.startswith("model.") and isinstance(each, TensorStorageMetadata)}  # fmt: skip


def read_parameters(path: str, parameters: dict[str, torch.Tensor]) -> None:
    """Fill whole tensors, by parameter name, from a checkpoint: in this process alone, in each one's own dtype."""
    try:
        dcp.load({f"model.{name}": tensor for name, tensor in parameters.items()}, storage_reader=_reader(path), no_dist=True)
    except CheckpointException as error:  # a BaseException, whose own text is a traceback
        cause = next(iter(error.failures.values()))[0]
        raise RuntimeError(f"{path} can't be read: {type(cause).__name__}: {cause}") from error


def _create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """An optimizer has no state before its first step: take one with zero gradients and lr 0, which changes nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr


PIECE_BYTES = 1 << 30


class _InPieces:
    """A DCP writer that writes a rank's items file by file, each of about PIECE_BYTES.

    DCP's own holds on to the host copy of every tensor until their file is done: with one file a rank that is the
    rank's whole shard in host memory (seen: 79 GB a process for Qwen2-7B on two GPUs).
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        results: list[WriteResult] = []
        for number, items in enumerate(_pieces(plan.items)):
            prefix = dataclasses.replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = dataclasses.replace(plan, items=items, storage_data=prefix)
            results += super().write_data(part, planner).wait()  # type: ignore[misc]
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        done.set_result(results)
        return done


class _FileWriter(_InPieces, dcp.FileSystemWriter):
    pass


class _UrlWriter(_InPieces, FsspecWriter):
    pass


def _pieces(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """The items in groups of about PIECE_BYTES, at least one item each."""
    group: list[WriteItem] = []
    size = 0
    for item in items:
        if group and size >= PIECE_BYTES:
            yield group
            group, size = [], 0
        group.append(item)
        size += math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize if item.tensor_data else 0
    if group:
        yield group


def _writer(path: str) -> dcp.StorageWriter:
    return _UrlWriter(path) if "://" in path else _FileWriter(path)


def _reader(path: str) -> dcp.StorageReader:
    return FsspecReader(path) if "://" in path else dcp.FileSystemReader(path)
