"""Agreement of all ranks on how an action went: well on every one, or the same error is raised on
every one.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from tp_trainer.config import lasting

T = TypeVar("T")
AGREE_SECONDS = 2 * 60 * 60  # that the first rank to have written waits for the last


class RankFailed(RuntimeError):
    """Something failed on a rank or more; raised on all of them. `lasts`: it would fail the same
    again."""

    def __init__(self, text: str, lasts: bool = False) -> None:
        super().__init__(text)
        self.lasts = lasts


class Ranks:
    """All ranks, over a process group of their own, which one thread at a time uses."""

    def __init__(self) -> None:
        self.group = dist.new_group(
            backend="gloo", timeout=datetime.timedelta(seconds=AGREE_SECONDS)
        )

    def agree(self, action: Callable[[], T]) -> list[T]:
        """Run an action on every rank. Returns all results, or raises the same RuntimeError
        everywhere that any of them failed.
        """
        result, error, lasts = None, None, False
        try:
            result = action()
        except Exception as raised:
            lasts = lasting(raised)
            error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:300]}"
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, (result, error, lasts), group=self.group)
        failed = [f"rank {rank}: {error}" for rank, (_, error, _) in enumerate(answers) if error]
        if failed:
            more = f"; and {len(failed) - 3} more ranks" if len(failed) > 3 else ""
            raise RankFailed("; ".join(failed[:3]) + more, any(lasts for _, _, lasts in answers))
        return [result for result, _, _ in answers]

    def on_first(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0. Returns its result everywhere, or raises RuntimeError
        everywhere.
        """
        return self.agree(lambda: action() if dist.get_rank() == 0 else None)[0]  # type: ignore[return-value]
