"""Parameter groups, the optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tp_trainer.config import Optim, Train
from tp_trainer.optim.adamw import AdamW

__all__ = ["AdamW", "Guard", "build_optimizer", "learning_rate", "set_learning_rate"]


def build_optimizer(optim: Optim, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> AdamW:
    """Fused AdamW, its state allocated. Matrices decay; norms and biases (one dimension) don't.

    Parameters on different meshes can't go through one fused call: a group each.
    """
    groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
    for _, parameter in named_parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((parameter.ndim > 1, mesh), []).append(parameter)
    optimizer = AdamW(
        [{"params": params, "weight_decay": optim.weight_decay if decays else 0.0} for (decays, _), params in groups.items()],
        lr=optim.lr or 0.0, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True,
    )  # fmt: skip
    optimizer.allocate()
    return optimizer


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


class Guard:
    """Which steps don't count: those whose loss or gradient norm is no number, or, if asked for, far above the last ones'.

    It judges on the device and the host reads a step later, so that neither waits for the other. Both numbers are the
    same on all ranks, and so is every verdict.
    """

    def __init__(self, train: Train, device: torch.device, memory: dict[str, Any]) -> None:
        """`memory`: what `memory()` gave when the run was saved; empty at its start."""
        self.zscore, self.window = train.spike_zscore, train.spike_window
        self.skipped = int(memory.get("skipped", 0))  # as far as the host has read
        self.counts = torch.tensor([self.skipped, int(memory.get("in_a_row", 0))], device=device)  # skipped: in all, in a row
        recent = torch.tensor(memory.get("recent", []), device=device).reshape(-1, 2)[-self.window :]
        self.known = torch.tensor(len(recent), device=device)
        self.recent = torch.cat([torch.zeros(self.window - len(recent), 2, device=device), recent])  # loss, norm; the newest last
        self.unread: deque[tuple[int, torch.Tensor, torch.cuda.Event | None]] = deque()

    def judge(self, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Whether to skip this step: float32 scalar, 1 or 0, on the device. Called once a step."""
        values = torch.stack([loss, norm]).float()
        skip = ~values.isfinite().all()
        if self.zscore is not None:
            limit = self.recent.mean(0) + self.zscore * self.recent.std(0)
            skip |= (self.known >= self.window) & (values > limit).any()
            self.recent = torch.where(skip, self.recent, torch.cat([self.recent[1:], values[None]]))
            self.known = self.known + ~skip
        self.counts = torch.stack([self.counts[0] + skip, (self.counts[1] + 1) * skip])
        return skip.float()

    def seen(self, step: int, at_once: bool) -> list[tuple[int, int, int]]:
        """Skipped steps that the host hasn't heard of yet: (step, how many in all, how many in a row). Called once a step.

        Args:
            at_once: up to this step (waits for the device), not only up to the one before.
        """
        counts, event = self.counts, None
        if counts.is_cuda:
            counts = torch.empty(2, dtype=counts.dtype, pin_memory=True).copy_(counts, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.unread.append((step, counts, event))
        found = []
        while self.unread and (at_once or event is None or len(self.unread) > 1):
            step, counts, recorded = self.unread.popleft()
            if recorded is not None:
                recorded.synchronize()
            total, in_a_row = counts.tolist()
            if total > self.skipped:
                self.skipped = total
                found.append((step, total, in_a_row))
        return found

    def memory(self) -> dict[str, Any]:
        """What a checkpoint must hold of it, as JSON."""
        known = min(int(self.known), self.window) if self.zscore is not None else 0
        total, in_a_row = self.counts.tolist()
        return {"skipped": total, "in_a_row": in_a_row, "recent": self.recent[self.window - known :].tolist()}
