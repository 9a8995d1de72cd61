"""The pool that runs the other tests: what fails in a rank fails the test, what hangs ends."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankError, RankPool


def total(start: int) -> float:
    value = torch.tensor(float(start + dist.get_rank()))
    dist.all_reduce(value)
    return value.item()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("this one")
    dist.barrier()


def hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)
    dist.barrier()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(9)
    dist.barrier()


def crash_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()


@pytest.mark.parametrize("world", [4, 1, 2, 4])
def test_worlds(ranks: RankPool, world: int) -> None:
    assert ranks.run(world, total, 10) == [10.0 * world + sum(range(world))] * world


def test_failures() -> None:
    pool = RankPool(2)
    try:
        deaths = ((die_on, r"died \(exit code 9\)"), (crash_on, r"(?s)died \(exit code -11\).*in crash_on"))
        for function, sentence in ((fail_on, "this one"), *deaths):
            with pytest.raises(RankError, match=sentence):
                pool.run(2, function, 1, timeout=60)
        with pytest.raises(RankError, match=r"(?s)no answer after 3 s.*rank 1 hangs.*in hang_on"):
            pool.run(2, hang_on, 1, timeout=3)
        assert pool.run(2, total, 0) == [1.0, 1.0]
    finally:
        pool.stop()
