"""One writer: claims, dead owners, two that claim at once."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tp_trainer.checkpoint import owner as module
from tp_trainer.checkpoint.owner import OWNER, Owner, owned_by
from tp_trainer.checkpoint.store import Store
from tp_trainer.config import ConfigError

pytestmark = pytest.mark.processes


@pytest.fixture(params=["local", "url"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    monkeypatch.setattr(module, "SETTLE", 0.1)
    made = Store(str(tmp_path / "run") if request.param == "local" else "memory://owners/run")
    yield made
    if request.param == "url":
        made.fs.rm(made.root, recursive=True)


def left(store: Store, **changes: Any) -> None:
    """A lock as this process would have left it, but for the changes."""
    record = {**Owner(store, "old").record, "heartbeat": time.time(), **changes}
    store.write_json(OWNER, record)


def refused(store: Store) -> str:
    with pytest.raises(ConfigError) as raised:
        Owner(store, "new").claim("experiment_name", "a")
    assert not owned_by(store, "new")
    return str(raised.value)


def taken_over(store: Store) -> str:
    """What is said of the dead owner that a new one follows."""
    mine = Owner(store, "new")
    mine.claim("experiment_name", "a")
    mine.release()
    assert mine.taken_over is not None
    return mine.taken_over


def test_a_claim_and_its_release(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Owner(store, "first")
    assert not owned_by(store, "first")
    first.claim("experiment_name", "a")
    assert owned_by(store, "first") and not owned_by(store, "second")
    monkeypatch.setattr(module, "WATCH", math.inf)  # a process of this machine is looked up
    said = refused(store)
    assert said.startswith(
        f"experiment_name=a: is being trained by process {os.getpid()} on {socket.gethostname()},"
        " since 2"
    )
    first.release()
    second = Owner(store, "second")
    second.claim("experiment_name", "a")
    assert second.taken_over is None and owned_by(store, "second")
    second.release()
    assert not store.exists(OWNER)


def test_a_killed_owner_is_followed(store: Store) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left(store, pid=child.pid, started=module._started(child.pid))
    refused(store)
    child.kill()
    # from now on a zombie: its parent, this process, hasn't asked for it
    while module._started(child.pid) is not None:
        time.sleep(0.01)
    assert f"process {child.pid}" in taken_over(store)
    child.wait()


def test_a_process_number_that_was_given_anew(store: Store) -> None:
    left(store, started="1")
    assert taken_over(store)


def test_an_owner_on_another_machine(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged by its heartbeat alone: process numbers mean nothing there."""
    monkeypatch.setattr(module, "WATCH", 1.0)
    far: dict[str, Any] = {"machine": "another", "host": "far", "pid": 1, "started": "1"}
    left(store, **far)
    assert "process 1 on far" in refused(store)
    left(store, **far, heartbeat=time.time() - 61)
    assert "process 1 on far" in taken_over(store)


def test_another_machine_whose_clock_is_slow(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH", 3.0)
    far: dict[str, Any] = {"machine": "another", "host": "far", "pid": 1, "started": "1"}
    began, read = time.monotonic(), module._read

    def beating(store: Store) -> dict[str, Any] | None:
        left(store, **far, since="then", heartbeat=1000 + (time.monotonic() - began) // 2)
        return read(store)

    monkeypatch.setattr(module, "_read", beating)
    assert "process 1 on far" in refused(store)


def test_an_owner_that_lost_its_directory_learns_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT", 0.05)
    mine = Owner(store, "mine")
    mine.claim("experiment_name", "a")
    first = store.read_json(OWNER)["heartbeat"]  # type: ignore[index]
    while store.read_json(OWNER)["heartbeat"] <= first:  # type: ignore[index]
        time.sleep(0.01)
    assert not mine.lost.is_set()
    mine.released.set()  # so that no heartbeat is being written meanwhile
    mine.thread.join()
    other = Owner(store, "mine")
    left(store, launch="other")
    other.thread.start()
    assert other.lost.wait()
    mine.release()
    assert owned_by(store, "other"), "it is no longer its own to release"


def _claim(root: str, launch: str, barrier: Any, answers: Any) -> None:
    mine, dead = Owner(Store(root), launch), module._dead

    def slow(owner: dict[str, Any]) -> bool:  # so that all would have read before one writes
        time.sleep(0.1)
        return dead(owner)

    module._dead, module.WATCH = slow, 1.0
    barrier.wait()
    try:
        mine.claim("experiment_name", "a")
        answers.put((launch, True))
        time.sleep(3600)  # alive until all have tried
    except ConfigError:
        answers.put((launch, False))


@pytest.mark.slow
@pytest.mark.parametrize(
    "dead", [{"started": "1"}, {"machine": "another", "heartbeat": 1000}], ids=["here", "elsewhere"]
)
def test_of_many_that_take_over_at_once_one_wins(dead: dict[str, Any], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(2):
        store = Store(str(tmp_path / str(attempt)))
        left(store, **dead)
        barrier, answers = context.Barrier(8), context.Queue()
        takers = [
            context.Process(target=_claim, args=(store.run_dir, f"t{number}", barrier, answers))
            for number in range(8)
        ]
        for each in takers:
            each.start()
        seen = dict(answers.get() for _ in takers)
        winner = [launch for launch, won in seen.items() if won]
        assert (
            len(winner) == 1
            and json.loads((tmp_path / str(attempt) / OWNER).read_text())["launch"] == winner[0]
        )
        for each in takers:
            each.kill()
            each.join()
