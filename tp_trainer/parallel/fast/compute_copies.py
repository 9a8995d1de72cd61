"""Mixed precision where dp is 1 and nothing is sharded: what FSDP2 does for the other layouts,
without its hooks.

The parameters stay float32 DTensors for storage, optimizer and checkpoint. A pass over the model
runs with plain local tensors in their place: copies in the dtype of compute, or, in float32, the
same memory. The copies are either resident, two bytes a parameter that our optimizer writes along,
or made block by block: only the block under way has its copies, cast anew in each pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

Pair = tuple[torch.Tensor, torch.Tensor]  # a copy, and this rank's part of its parameter


class ComputeCopies:
    """What the model computes with instead of its parameters. A gradient goes to its parameter as
    soon as it is formed.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        low: Set[nn.Parameter],
        by_block: Sequence[nn.Module] = (),
    ) -> None:
        """
        Args:
            model: with weights, its parameters DTensors, those that are trained in float32.
            low: parameters whose gradient stays in the dtype of compute where nothing is added to
                it; for an optimizer that takes it.
            by_block: modules that run one after the other and whose copies exist only while they
                run, forward or backward; all others' are resident. No parameter is in two of them.
        """
        self.dtype, self.low = dtype, low
        # whether a step has several micro-batches; their gradients are added up in float32
        self.adding = False
        self.resident: list[Pair] = []  # of those with another dtype
        self.fresh = False  # whether the resident ones are what the parameters are
        self.slots: list[
            tuple[dict[str, nn.Parameter | None], str, nn.Parameter, nn.Parameter]
        ] = []
        self.blocks: list[_Block] = []
        self.under_way: _Block | None = None
        copies: dict[int, nn.Parameter] = {}
        for root in (*by_block, model):
            pairs: list[Pair] = []
            for module in root.modules():
                for parameter in module.parameters(recurse=False):
                    if id(parameter) not in copies:
                        copies[id(parameter)] = self._copy(parameter, pairs, root is model)
            if root is model:
                self.resident = pairs
            elif pairs:
                self.blocks.append(_Block(root, pairs, weakref.ref(self)))
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                self.slots.append((module._parameters, key, parameter, copies[id(parameter)]))

    def _copy(self, parameter: nn.Parameter, pairs: list[Pair], resident: bool) -> nn.Parameter:
        assert isinstance(parameter, DTensor)
        own = parameter.to_local().detach()
        copy = nn.Parameter(own.to(self.dtype), requires_grad=parameter.requires_grad)
        if self.dtype != own.dtype:
            pairs.append((copy.detach(), own))
            if resident:  # for an optimizer that writes it along
                parameter.compute_copy = copy.detach()  # type: ignore[attr-defined]
            else:
                copy.untyped_storage().resize_(0)
        if not parameter.requires_grad:
            return copy
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
        if self.resident and not self.fresh:
            copies, parameters = zip(*self.resident, strict=True)
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
            self.give_way(None)
            for parameters, key, parameter, _ in self.slots:
                parameters[key] = parameter

    def give_way(self, block: _Block | None) -> None:
        """Free the block's copies that is under way, and make those of the next; None: of none.

        In the backward pass a block's weights have all been used once the gradient of its input is
        there, which is when the one before it begins.
        """
        if block is self.under_way:
            return
        if self.under_way is not None:
            self.under_way.free()
        if block is not None:
            block.fill()
        self.under_way = block


class _Block:
    """Copies that exist only while their module runs."""

    def __init__(
        self, module: Any, pairs: Sequence[Pair], owner: weakref.ref[ComputeCopies]
    ) -> None:
        self.pairs, self.owner = pairs, owner
        self.sizes = [own.numel() * copy.element_size() for copy, own in pairs]
        # around what nn.Module calls, compiled or not: hooks would lie within what is compiled
        self.inner = module._compiled_call_impl or module._call_impl
        module._compiled_call_impl = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._begin()
        out = self.inner(*args, **kwargs)
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and each.requires_grad:
                each.register_hook(self._begin)
        return out

    def _begin(self, gradient: torch.Tensor | None = None) -> None:
        owner = self.owner()
        assert owner is not None
        owner.give_way(self)

    @torch.no_grad()
    def fill(self) -> None:
        for (copy, _), size in zip(self.pairs, self.sizes, strict=True):
            copy.untyped_storage().resize_(size)
        copies, parameters = zip(*self.pairs, strict=True)
        # what autograd has saved of an earlier time is what it is now
        with torch.autograd._unsafe_preserve_version_counter(copies):
            torch._foreach_copy_(copies, parameters)

    def free(self) -> None:
        for copy, _ in self.pairs:
            copy.untyped_storage().resize_(0)
