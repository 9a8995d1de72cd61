"""Parameter groups, the optimizer, its learning rate, and which steps don't count."""

from __future__ import annotations

from collections import deque
from typing import TypedDict

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tp_trainer.config import ResolvedOptim, Train
from tp_trainer.optim.adamw import AdamW
from tp_trainer.optim.schedule import Schedule, learning_rate
from tp_trainer.parameters import ParameterGroups

__all__ = ["AdamW", "Guard", "Schedule", "build_optimizer", "learning_rate", "set_learning_rate"]


def build_optimizer(optim: ResolvedOptim, parameters: ParameterGroups) -> AdamW:
    """Fused AdamW, its state allocated. Matrices and tables decay; vectors don't.

    Parameters on different meshes can't go through one fused call: a group each.
    """
    groups: dict[tuple[bool, object], list[nn.Parameter]] = {}
    for kind, decays in (
        (parameters.matrix, True),
        (parameters.table, True),
        (parameters.vector, False),
    ):
        for parameter in kind.values():
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((decays, mesh), []).append(parameter)
    optimizer = AdamW(
        [
            {"params": params, "weight_decay": optim.weight_decay if decays else 0.0}
            for (decays, _), params in groups.items()
        ],
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        fused=True,
    )
    optimizer.allocate()
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


class GuardMemory(TypedDict, total=False):
    """What a checkpoint must hold of a Guard, as JSON."""

    skipped: int  # steps, in all
    in_a_row: int
    recent: list[list[float]]  # (loss, norm) of steps that counted, the newest last


class Guard:
    """Which steps don't count: those whose loss or gradient norm is no number, or, if asked for,
    far above the last ones'.

    It judges on the device and the host reads a step later, so that neither waits for the other.
    Both numbers are the same on all ranks, and so is every verdict.
    """

    def __init__(self, train: Train, device: torch.device, memory: GuardMemory) -> None:
        """`memory`: what `memory()` gave when the run was saved; empty at its start."""
        self.zscore, self.window = train.spike_zscore, train.spike_window
        self.skipped = int(memory.get("skipped", 0))  # as far as the host has read
        # skipped: in all, in a row
        self.counts = torch.tensor([self.skipped, int(memory.get("in_a_row", 0))], device=device)
        recent = torch.tensor(memory.get("recent", []), device=device).reshape(-1, 2)[
            -self.window :
        ]
        self.known = torch.tensor(len(recent), device=device)
        # loss, norm; the newest last
        self.recent = torch.cat([torch.zeros(self.window - len(recent), 2, device=device), recent])
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
        """Skipped steps that the host hasn't heard of yet: (step, how many in all, how many in a
        row). Called once a step.

        Args:
            at_once: up to this step (waits for the device), not only up to the one before.
        """
        counts, event = self.counts, None
        if counts.is_cuda:
            counts = torch.empty(2, dtype=counts.dtype, pin_memory=True).copy_(
                counts, non_blocking=True
            )
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

    def memory(self) -> GuardMemory:
        """What a checkpoint must hold of it, as JSON."""
        known = min(int(self.known), self.window) if self.zscore is not None else 0
        total, in_a_row = self.counts.tolist()
        return {
            "skipped": total,
            "in_a_row": in_a_row,
            "recent": self.recent[self.window - known :].tolist(),
        }
