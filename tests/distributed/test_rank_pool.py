"""The pool that runs the other tests: what fails in a rank fails the test, what hangs ends."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_reference import FAMILIES, settings_of
from rank_cases import run_steps
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


@pytest.mark.slow
def test_failures() -> None:
    pool = RankPool(2, hangs=(0.1, 6.0))
    try:
        deaths = (
            (die_on, r"died \(exit code 9\)"),
            (crash_on, r"(?s)died \(exit code -11\).*in crash_on"),
        )
        for function, sentence in ((fail_on, "this one"), *deaths):
            with pytest.raises(RankError, match=sentence):
                pool.run(2, function, 1)
        with pytest.raises(RankError, match=r"(?s)no answer, less than.*rank 1 hangs.*in hang_on"):
            pool.run(2, hang_on, 1)
        assert pool.run(2, total, 0) == [1.0, 1.0]
    finally:
        pool.stop()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"tp": 2, "dp": 2, "dp_replicate": 2}, {"tp": 4, "dp": 1}])
def test_a_case_leaves_no_thread_behind(ranks: RankPool, layout: dict[str, int]) -> None:
    """Those of a process group, of whose mesh DTensor remembers something."""
    ranks.run(4, total, 0)
    before = [threads(each.pid) for each in ranks.processes]
    ranks.run(4, run_steps, settings_of(FAMILIES["qwen2"], parallelism=layout), 2)
    ranks.run(4, total, 0)
    assert [threads(each.pid) for each in ranks.processes] == before


def threads(process: int) -> int:
    return len(os.listdir(f"/proc/{process}/task"))


def test_a_crash_of_gloos_own_thread_is_told_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, tries = RankPool(2), []

    def crash(frame: str) -> list[Any]:
        def once(world: int, *args: Any) -> list[Any]:
            tries.append(frame)
            if tries.count(frame) == 1:
                text = f"--- rank 1\ndied (exit code -11)\nframe #0: handler\n{frame}\n"
                raise RankError(f"{text}Fatal Python error: Segmentation fault\n gloo::x\n")
            return [0, 1]

        monkeypatch.setattr(pool, "_once", once)
        return pool.run(2, total, 0)

    with pytest.warns(UserWarning, match="gloo crashed by itself"):
        assert crash("frame #1: gloo::transport::tcp::Loop::run()") == [0, 1]
    for other in ("frame #1: at::native::mul", "<omitting python frames>\nframe #3: gloo::x"):
        with pytest.raises(RankError, match="exit code -11"):
            crash(other)
