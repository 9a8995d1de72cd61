"""Parameter groups, the optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tp_trainer.config import Optim


def build_optimizer(optim: Optim, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Fused AdamW. Matrices decay; norms and biases (one dimension) don't.

    Parameters on different meshes can't go through one fused call: a group each.
    """
    groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
    for _, parameter in named_parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((parameter.ndim > 1, mesh), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": optim.weight_decay if decays else 0.0} for (decays, _), params in groups.items()],
        lr=optim.lr or 0.0, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True,
    )  # fmt: skip


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (0 is the first) in a run of `total_steps`.

    Linear warm-up, then cosine (Loshchilov & Hutter 2017), linear, constant, or warm-up-stable-decay (Hu et al. 2024,
    arXiv:2404.06395), down to `min_lr_ratio` x lr at the last step.
    """
    peak, floor = optim.lr or 0.0, (optim.lr or 0.0) * optim.min_lr_ratio
    warmup = optim.warmup_steps if optim.warmup_steps is not None else total_steps // 20
    if step < warmup:
        return peak * (step + 1) / warmup
    if optim.schedule == "constant":
        return peak
    start = warmup
    if optim.schedule == "wsd":
        start = max(warmup, total_steps - (optim.decay_steps if optim.decay_steps is not None else total_steps // 10))
        if step < start:
            return peak
    part = min(1.0, (step - start) / max(1, total_steps - 1 - start))
    shape = 0.5 * (1 + math.cos(math.pi * part)) if optim.schedule == "cosine" else 1 - part
    return floor + (peak - floor) * shape


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
