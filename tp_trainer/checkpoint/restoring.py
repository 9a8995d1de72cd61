"""Checkpoints found, read through and loaded by all ranks together, in any layout.

Every rank reads the slices that it needs. All that goes through torch's planners are tensors, under
`model.<parameter>`, `optim.<parameter>.<state>` and `rng.<rank>.<device>`; the rest is state.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from tp_trainer.checkpoint.files import read_tensors
from tp_trainer.checkpoint.layout import Stored, read_metadata
from tp_trainer.checkpoint.manifest import Damaged
from tp_trainer.checkpoint.ranks import Ranks
from tp_trainer.checkpoint.state import RunState
from tp_trainer.checkpoint.store import Store, Unknown, VerifiedCheckpoint, at, named
from tp_trainer.config import ConfigError


class CheckpointReader:
    """The checkpoints in a run's directory, for one model and its optimizer. Every method is called
    by all ranks together.
    """

    def __init__(
        self,
        run_dir: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
    ) -> None:
        self.store, self.ranks = Store(run_dir), Ranks()
        self.model, self.optimizer, self.device = model, optimizer, device
        self.damaged: set[str] = set()  # names of checkpoints that were found damaged

    def newest(self, launch: str | None = None) -> tuple[VerifiedCheckpoint | None, list[str]]:
        """The newest checkpoint that verifies (of this launch of the program, if given) and what
        was passed over: `name (why)`.
        """
        skipped: list[str] = []
        for name in reversed(self.ranks.on_first(self.store.step_names)):
            found = self.ranks.on_first(partial(self.store.check, name))
            if (
                isinstance(found, VerifiedCheckpoint)
                and launch is not None
                and found.state.launch != launch
            ):
                continue
            reason = found if isinstance(found, str) else self.damage(found)
            if reason is None:
                assert isinstance(found, VerifiedCheckpoint)
                return found, skipped
            if not isinstance(reason, Unknown):
                self.damaged.add(name)
            skipped.append(f"{name} ({reason})")
        return None, skipped

    def pinned(self, path: str) -> VerifiedCheckpoint | str:
        """The checkpoint at a full path once it verifies, or why it doesn't count."""
        found = self.ranks.on_first(lambda: at(path))
        return found if isinstance(found, str) else self.damage(found) or found

    def damage(self, found: VerifiedCheckpoint) -> str | None:
        """Read a checkpoint through, each rank its share: why it doesn't count, the same on every
        rank, or None.
        """
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

        return next((reason for reason in self.ranks.agree(look) if reason), None)

    def restore(self, found: VerifiedCheckpoint) -> RunState:
        """Load into the model and the optimizer, in any layout. Returns the checkpoint's
        state.json.

        Random number generators are restored where world size and device are the checkpoint's own.

        Raises:
            ConfigError: it has other tensors, shapes or dtypes; nothing was loaded.
            RuntimeError: it can't be read.
        """
        _create_optimizer_state(self.optimizer)
        same = found.state.world == dist.get_world_size() and found.state.device == self.device.type
        tensors = self.tensors(with_rng=same)

        def read() -> str | None:
            stored = read_metadata(found)
            if differing := _differing(stored, tensors):
                return differing
            read_tensors(found, stored, tensors)
            return None

        differs = next((answer for answer in self.ranks.agree(read) if answer), None)
        if differs:
            raise ConfigError(
                "checkpoint.resume",
                found.path,
                f"its tensors are not those of this model and optimizer: {differs}",
            )
        if same:
            rank = dist.get_rank()
            torch.set_rng_state(tensors[f"rng.{rank}.cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors[f"rng.{rank}.cuda"], self.device)
        return found.state

    def tensors(self, with_rng: bool) -> dict[str, torch.Tensor]:
        """All that is saved and restored, by its name there; sharded tensors as they are."""
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
    """Names and shapes of the model's parameters in a checkpoint. Raises ConfigError where it is
    damaged.
    """
    try:
        stored = read_metadata(named("checkpoint.path", path))
    except Damaged as error:
        raise ConfigError("checkpoint.path", path, f"damaged: {error}") from error
    return {
        name.removeprefix("model."): each.shape
        for name, each in stored.items()
        if name.startswith("model.")
    }


def read_parameters(path: str, parameters: dict[str, torch.Tensor]) -> None:
    """Fill whole tensors, by parameter name, from a checkpoint: in this process alone, in each
    one's own dtype.

    Raises:
        ConfigError: one of the files that they lie in is damaged.
    """
    found, tensors = (
        named("checkpoint.path", path),
        {f"model.{name}": tensor for name, tensor in parameters.items()},
    )
    try:
        stored = read_metadata(found)
        reason = found.store.damage(
            found, sorted({chunk.file for name in tensors for chunk in stored[name].chunks})
        )
        if reason is not None:
            raise ConfigError("checkpoint.path", path, reason)
        read_tensors(found, stored, tensors)
    except Damaged as error:
        raise ConfigError("checkpoint.path", path, f"damaged: {error}") from error


def _differing(stored: Mapping[str, Stored], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """How a checkpoint's tensors differ from those to be filled, or None. Random states that nobody
    asks for don't count."""
    have = {
        name: (each.shape, each.dtype)
        for name, each in stored.items()
        if not name.startswith("rng.") or name in tensors
    }
    want = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    wrong = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
    each = [
        f"{name} is {_shown(have.get(name))} there and {_shown(want.get(name))} here"
        for name in wrong[:3]
    ]
    more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return "; ".join(each) + more if wrong else None


def _shown(tensor: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return f"{str(tensor[1]).removeprefix('torch.')} {list(tensor[0])}" if tensor else "missing"


def _create_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """torch's optimizers have no state before their first step: take one with zero gradients and lr
    0, which changes nothing.
    """
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
