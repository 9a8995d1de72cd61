"""What any rank wishes, known to all: how a run saves or ends at the same step everywhere."""

from __future__ import annotations

import torch
import torch.distributed as dist

# a checkpoint now; the end of the run; a checkpoint, and then these workers have to go
SAVE, STOP, LEAVE = 1, 2, 4


class Agreement:
    """Ors the wishes of all ranks once a step, on the hosts alone: no device waits, and the
    exchange runs beside the step.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo")
        self.wishes = torch.zeros(1, dtype=torch.int64)
        self.work: dist.Work | None = None

    def ask(self, wishes: int) -> None:
        """Begin an all-reduce; every rank calls it once a step, `wishes` being its own bits."""
        self.wishes.fill_(wishes)
        self.work = dist.all_reduce(self.wishes, dist.ReduceOp.BOR, group=self.group, async_op=True)

    def answer(self) -> int:
        """The wishes of all ranks; waits until each has asked."""
        assert self.work is not None
        self.work.wait()
        return int(self.wishes)
