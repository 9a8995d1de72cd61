"""Copies of the parameters in the dtype of compute, kept from one step to the next.

The parameters stay float32 DTensors for storage, optimizer and checkpoint. FSDP2 casts them anew for each all-gather; from a
copy, which our optimizer writes along, it only moves them. Where dp is 1 nothing is sharded: there a pass over the model runs
with plain local tensors in the parameters' place, without FSDP's hooks and copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from tp_trainer.parallel.mesh import Mesh


def place(model: nn.Module, mesh: Mesh) -> None:
    """Put each parameter of the meta model on the whole mesh, as FSDP2 would: (dp, tp) where tp splits it, else (dp)."""
    placed: dict[int, nn.Parameter] = {}  # tied parameters must stay one
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in placed:
                own: Any = parameter.detach()
                where, over_tp = mesh.full["dp"], ()
                if isinstance(own, DTensor):
                    own, where, over_tp = own.to_local(), mesh.full, own.placements
                placed[id(parameter)] = nn.Parameter(DTensor.from_local(
                    own, where, [Replicate(), *over_tp], run_check=False, shape=parameter.shape, stride=parameter.stride(),
                ), requires_grad=parameter.requires_grad)  # fmt: skip
            setattr(module, key, placed[id(parameter)])


class Copies:
    """Of this rank's part of each parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.adding = False  # whether a step has several micro-batches; their gradients are added up in float32
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # (copy, parameter), of those with another dtype
        self.fresh = False  # whether they are what the parameters are

    def add(self, parameter: nn.Parameter, own: torch.Tensor) -> torch.Tensor:
        """A copy of `own`, the parameter's local part; the same memory where that has the dtype already."""
        copy = own.detach().to(self.dtype)
        if self.dtype != own.dtype:
            parameter.compute_copy = copy  # type: ignore[attr-defined]  # for an optimizer that writes it along
            self.pairs.append((copy, own.detach()))
        return copy

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what the parameters are now, unless they are known to be the same."""
        if self.pairs and not self.fresh:
            copies, parameters = zip(*self.pairs, strict=True)
            torch._foreach_copy_(copies, parameters)
        self.fresh = True

    def installed(self) -> AbstractContextManager[None]:
        """The model's passes, forward and backward, belong in here."""
        return nullcontext()


class ShardCopies(Copies):
    """What FSDP2 gathers instead of its shards, by its own extension for that: fsdp_pre_all_gather and fsdp_post_all_gather."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, mesh: Mesh) -> None:
        """`model`: with weights, wrapped, before its first pass."""
        super().__init__(dtype)
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            own: Any = parameter._local_tensor  # the very tensor that FSDP looks at
            if own.dtype != dtype and own.shape[0] == _padded_rows(parameter, mesh):  # a shorter shard FSDP casts and pads itself
                own.fsdp_pre_all_gather, own.fsdp_post_all_gather = partial(_before_gather, self.add(parameter, own)), _after_gather


def _padded_rows(parameter: DTensor, mesh: Mesh) -> int:
    """The rows of the longest shard of what this rank's TP rank has of the parameter."""
    rows = parameter.shape[0]
    if "tp" in (parameter.device_mesh.mesh_dim_names or ()) and parameter.placements[-1].is_shard(0):
        longest = -(-rows // mesh.tp_size)
        rows = max(0, min(longest, rows - mesh.tp_rank * longest))
    return -(-rows // mesh.full["dp"].size())


def _before_gather(copy: torch.Tensor, mesh: Any, size: Any, stride: Any, module: Any, policy: Any) -> tuple[tuple[torch.Tensor], None]:
    return (copy,), None


def _after_gather(
    outputs: tuple[torch.Tensor, ...], metadata: None, dtype: torch.dtype, *, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None:
    """What was gathered is the parameter."""
    return (outputs[0], outputs) if out is None else None


class LocalCopies(Copies):
    """What the model computes with instead of its parameters. A gradient goes to its parameter as soon as it is formed."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, low: Set[nn.Parameter]) -> None:
        """
        Args:
            model: with weights, its parameters float32 DTensors.
            low: parameters whose gradient stays in the dtype of compute where nothing is added to it; for an optimizer that takes it.
        """
        super().__init__(dtype)
        self.low = low
        self.slots: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter, nn.Parameter]] = []
        copies: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in copies:
                    copies[id(parameter)] = self._copy(parameter)
                self.slots.append((module._parameters, key, parameter, copies[id(parameter)]))

    def _copy(self, parameter: nn.Parameter) -> nn.Parameter:
        assert isinstance(parameter, DTensor)
        own = parameter.to_local()
        copy = nn.Parameter(self.add(parameter, own), requires_grad=parameter.requires_grad)
        if parameter in self.low:
            parameter.grad_dtype = None  # any

        def hand_over(copy: torch.Tensor) -> None:
            gradient, copy.grad = copy.grad, None
            assert gradient is not None
            if parameter.grad is None:
                kept = parameter in self.low and not self.adding
                parameter.grad = DTensor.from_local(
                    gradient if kept else gradient.to(own.dtype), parameter.device_mesh, parameter.placements,
                    run_check=False, shape=parameter.shape, stride=parameter.stride(),
                )  # fmt: skip
            else:
                parameter.grad.to_local().add_(gradient)  # type: ignore[attr-defined]

        copy.register_post_accumulate_grad_hook(hand_over)
        return copy

    @contextmanager
    def installed(self) -> Iterator[None]:
        for parameters, key, _, copy in self.slots:
            parameters[key] = copy
        try:
            yield
        finally:
            for parameters, key, parameter, _ in self.slots:
                parameters[key] = parameter
