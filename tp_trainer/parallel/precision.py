"""Mixed precision where dp is 1 and nothing is sharded: what FSDP2 does for the other layouts, without its hooks and copies.

The parameters stay float32 DTensors for storage, optimizer and checkpoint. A pass over the model runs with plain local tensors
in their place: copies in the dtype of compute, which our optimizer writes along, or, in float32, the same memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Set
from contextlib import contextmanager
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


class ComputeCopies:
    """What the model computes with instead of its parameters. A gradient goes to its parameter as soon as it is formed."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, low: Set[nn.Parameter]) -> None:
        """
        Args:
            model: with weights, its parameters float32 DTensors.
            low: parameters whose gradient stays in the dtype of compute where nothing is added to it; for an optimizer that takes it.
        """
        self.dtype, self.low = dtype, low
        self.adding = False  # whether a step has several micro-batches; their gradients are added up in float32
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # (copy, parameter), of those with another dtype
        self.fresh = False  # whether they are what the parameters are
        self.slots: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter, nn.Parameter]] = []
        copies: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) not in copies:
                    copies[id(parameter)] = self._copy(parameter)
                self.slots.append((module._parameters, key, parameter, copies[id(parameter)]))

    def _copy(self, parameter: nn.Parameter) -> nn.Parameter:
        assert isinstance(parameter, DTensor)
        own = parameter.to_local().detach()
        copy = nn.Parameter(own.to(self.dtype), requires_grad=parameter.requires_grad)
        if self.dtype != own.dtype:
            parameter.compute_copy = copy.detach()  # type: ignore[attr-defined]  # for an optimizer that writes it along
            self.pairs.append((copy.detach(), own))
        if parameter in self.low:
            parameter.grad_dtype = None  # type: ignore[attr-defined]  # any

        # not self: the collector doesn't see what a hook holds, and the model would never be let go
        copies, low = weakref.ref(self), parameter in self.low

        def hand_over(copy: torch.Tensor) -> None:
            gradient, copy.grad, owner = copy.grad, None, copies()
            assert gradient is not None and owner is not None
            if parameter.grad is None:
                kept = low and not owner.adding
                # as FSDP2 makes its own: from_local, for autograd's sake, takes the host 40 us
                own_gradient = gradient if kept else gradient.to(own.dtype)
                parameter.grad = DTensor(own_gradient, parameter._spec, requires_grad=False)  # type: ignore[call-arg, arg-type]
            else:
                parameter.grad.to_local().add_(gradient)  # type: ignore[attr-defined]

        copy.register_post_accumulate_grad_hook(hand_over)
        return copy

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what the parameters are now, unless they are known to be the same."""
        if self.pairs and not self.fresh:
            copies, parameters = zip(*self.pairs, strict=True)
            torch._foreach_copy_(copies, parameters)
        self.fresh = True

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model's passes, forward and backward, belong in here."""
        for parameters, key, _, copy in self.slots:
            parameters[key] = copy
        try:
            yield
        finally:
            for parameters, key, parameter, _ in self.slots:
                parameters[key] = parameter
