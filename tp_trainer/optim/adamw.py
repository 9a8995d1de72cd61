"""AdamW in one pass over memory on GPUs: clipping, the skipping of a step and the copies that the
model computes with included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU, or a platform without it: torch's own fused AdamW
    triton = None

BLOCK = 2048


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW(fused=True) with its state and attributes: gradients are divided by
    `grad_scale`, `found_inf` 1 skips a step.

    On GPUs one kernel a parameter reads and writes everything once. Gradients may be of lower
    precision there; a parameter's `compute_copy`, a tensor of its local shape, is written along.
    """

    grad_scale: torch.Tensor | None = None  # float32 scalar on the device
    found_inf: torch.Tensor | None = None  # float32 scalar on the device
    wrote_copies = False  # whether the last step wrote them

    @torch.no_grad()
    def allocate(self) -> None:
        """Make the state, all zero. Before the first pass over the model it lies close; later it
        would lie scattered among activations.
        """
        for parameter in (
            parameter for group in self.param_groups for parameter in group["params"]
        ):
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        groups = [
            (group, [each for each in group["params"] if each.grad is not None])
            for group in self.param_groups
        ]
        groups = [(group, parameters) for group, parameters in groups if parameters]
        ours = triton is not None and all(
            each.is_cuda and each.dtype == torch.float32
            for _, parameters in groups
            for each in parameters
        )
        for group, parameters in groups:
            (self._step_group if ours else self._step_group_as_torch_does)(group, parameters)
        self.wrote_copies = ours

    def _step_group_as_torch_does(
        self, group: dict[str, Any], parameters: list[torch.nn.Parameter]
    ) -> None:
        """On local tensors: through DTensors the host takes longer than the whole update of a small
        model.
        """
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            [_local(each) for each in parameters],
            [_local(each.grad).to(each.dtype) for each in parameters],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_group(self, group: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
        device, (beta1, beta2) = parameters[0].device, group["betas"]
        states = [self.state[parameter] for parameter in parameters]
        one = torch.ones((), device=device)
        skip = self.found_inf if self.found_inf is not None else 1 - one
        scale = self.grad_scale if self.grad_scale is not None else one
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1 - skip)
        done = steps[0].double()  # the same for all
        corrections = torch.stack([1 - beta1**done, (1 - beta2**done).sqrt()]).float()
        for parameter, state in zip(parameters, states, strict=True):
            own, gradient, first, second = map(
                _local, (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            )
            copy, count = getattr(parameter, "compute_copy", None), own.numel()
            if count == 0:
                continue
            assert (
                own.is_contiguous()
                and gradient.is_contiguous()
                and first.is_contiguous()
                and second.is_contiguous()
            )
            _adamw_kernel[(triton.cdiv(count, BLOCK),)](
                own,
                gradient,
                first,
                second,
                own if copy is None else copy,
                corrections,
                scale,
                skip,
                count,
                group["lr"],
                group["lr"] * group["weight_decay"],
                beta1,
                beta2,
                group["eps"],
                COPY=copy is not None,
                BLOCK=BLOCK,
                num_warps=8,
            )


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if triton is not None:

    @triton.jit
    def _adamw_kernel(  # type: ignore[no-untyped-def]
        parameter,
        gradient,
        first,
        second,
        copy,
        corrections,
        scale,
        skip,
        count,
        lr,
        decay,
        beta1,
        beta2,
        eps,
        COPY: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, as torch.optim.AdamW has it."""
        if tl.load(skip) != 0:
            return
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        p = tl.load(parameter + at, inside, other=0.0)
        g = tl.load(gradient + at, inside, other=0.0).to(tl.float32) / tl.load(scale)
        m = tl.load(first + at, inside, other=0.0)
        v = tl.load(second + at, inside, other=0.0)
        m += (g - m) * (1 - beta1)
        v = v * beta2 + g * g * (1 - beta2)
        p -= p * decay
        p -= lr / tl.load(corrections) * m / (tl.sqrt(v) / tl.load(corrections + 1) + eps)
        tl.store(parameter + at, p, inside)
        tl.store(first + at, m, inside)
        tl.store(second + at, v, inside)
        if COPY:
            tl.store(copy + at, p.to(copy.dtype.element_ty), inside)
