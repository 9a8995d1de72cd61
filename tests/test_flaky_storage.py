"""An object store of whose requests many fail: nothing whole is lost by it, and nothing is lost
unsaid."""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Callable
from typing import Any

import fsspec
import pytest

from tp_trainer.checkpoint import owner as ownership
from tp_trainer.checkpoint import requests as module
from tp_trainer.checkpoint.owner import Owner, owned_by
from tp_trainer.checkpoint.retention import keep
from tp_trainer.checkpoint.state import RunState
from tp_trainer.checkpoint.store import Store, Unknown, VerifiedCheckpoint, step_name
from tp_trainer.config import ConfigError

pytestmark = pytest.mark.processes

REQUESTS = ("ls", "info", "cat_file", "_open", "rm", "rm_file", "pipe_file", "makedirs")


class Flaky:
    """fsspec's file system in memory, of whose requests some fail while `rate` is above 0."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rate, self.random, self.failed = 0.0, random.Random(0), 0
        self.refuses: Callable[[str, str], bool] = lambda name, path: (
            self.random.random() < self.rate
        )
        monkeypatch.setattr(module, "AGAIN_SECONDS", (0.0, 0.0, 0.0))
        kind = fsspec.get_filesystem_class("memory")
        for name in REQUESTS:
            monkeypatch.setattr(kind, name, self.wrapped(name, getattr(kind, name)))

    def wrapped(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def request(fs: Any, path: str, *arguments: Any, **more: Any) -> Any:
            if self.refuses(name, str(path)):
                self.failed += 1
                raise OSError(f"503 at {name}")
            return method(fs, path, *arguments, **more)

        return request


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Flaky:
    return Flaky(monkeypatch)


def save(store: Store, step: int) -> str:
    """As Checkpoints does on rank 0, but for the tensors."""
    state = RunState(step, epoch=0, offset=0, tokens=0, global_batch_size=8)
    draft = store.begin(step)
    with store.create(f"{draft}/00000_0000.distcp") as sink:
        sink.write(b"x" * 1000)
        files = {"00000_0000.distcp": sink.close()}
    return store.commit(draft, state, b"{}", files)


def test_a_third_of_all_requests_fails(flaky: Flaky) -> None:
    """Every save that went well is there, but for those that the rules let go; of the others one
    hears."""
    saved = failed = 0
    warned: list[str] = []
    for seed in range(60):
        store = Store(f"memory://{uuid.uuid4().hex}/run")
        flaky.random, well = random.Random(seed), []
        for step in range(1, 7):
            flaky.rate = 0.35
            try:
                save(store, step)
                well.append(step)
                saved += 1
            except OSError:
                failed += 1
                store.discard(step_name(step))
            try:
                keep(store, 2, every=2, warn=warned.append)
            except OSError:
                warned.append("keep")
            flaky.rate = 0.0
        due = {step for step in well if step % 2 == 0} | set(well[-2:])
        for step in due:
            found = store.check(step_name(step))
            assert (
                isinstance(found, VerifiedCheckpoint) and store.damage(found, found.files) is None
            ), f"seed {seed}, step {step}: {found}"
        assert {store.newest()[0].step} == {well[-1]}  # type: ignore[union-attr]
    assert flaky.failed > 1000 and saved > 150 and failed > 50, (
        "a part of a large file nobody writes again"
    )


@pytest.mark.parametrize("file", ["", "manifest.json", "state.json"])
def test_what_cannot_be_looked_at_is_left_alone(file: str, flaky: Flaky) -> None:
    store = Store(f"memory://{uuid.uuid4().hex}/run")
    for step in (1, 2, 3, 4):
        save(store, step)
    hidden = f"{step_name(2)}/{file}".rstrip("/")
    flaky.refuses = lambda name, path: path.rstrip("/").endswith(hidden)
    warned: list[str] = []
    keep(store, 1, warn=warned.append)
    said = store.check(step_name(2))
    with pytest.raises(OSError, match="can't be looked at"):
        store.begin(2)
    flaky.refuses = lambda name, path: False
    assert isinstance(said, Unknown) and "503" in said
    assert store.step_names() == [
        "step_00000002",
        "step_00000004",
    ], "the others could be looked at, and weren't kept"
    assert isinstance(store.check(step_name(2)), VerifiedCheckpoint)
    assert len(warned) == 1 and warned[0].startswith(
        "step_00000002 is left alone: it can't be looked at (OSError: 503"
    )


def test_an_error_is_not_taken_for_absence(flaky: Flaky) -> None:
    """fsspec's `exists` does: a resume would have started over, a worker have refused a storage
    that it sees."""
    store = Store(f"memory://{uuid.uuid4().hex}/run")
    save(store, 1)
    flaky.refuses = lambda name, path: True
    for look in (
        store.step_names,
        lambda: store.exists("step_00000001"),
        store.newest,
        lambda: store.remove("x"),
    ):
        with pytest.raises(OSError, match="503"):
            look()
    count = itertools.count()
    flaky.refuses = lambda name, path: next(count) < 3
    assert store.step_names() == ["step_00000001"], "the fourth time it answered"
    flaky.refuses = lambda name, path: False
    assert store.exists("step_00000001") and not store.exists("step_00000002")
    assert Store(f"memory://{uuid.uuid4().hex}/run").step_names() == []


def test_an_owner_is_not_lost_to_a_failed_request(
    flaky: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "SETTLE", 0.0)
    monkeypatch.setattr(ownership, "BEAT", 0.01)
    store = Store(f"memory://{uuid.uuid4().hex}/run")
    mine = Owner(store, "mine")
    mine.claim("experiment_name", "run")
    asked = itertools.count()
    flaky.refuses = lambda name, path: next(asked) < 200
    while next(asked) < 400 and not mine.lost.is_set():
        mine.lost.wait(0.01)
    assert not mine.lost.is_set() and owned_by(store, "mine")
    flaky.refuses = lambda name, path: True
    with pytest.raises(OSError):
        owned_by(store, "mine")
    with pytest.raises(ConfigError, match=r"^checkpoint.storage_path=.*503"):
        Owner(store, "other").claim("experiment_name", "run")
    flaky.refuses = lambda name, path: False
    mine.release()
    assert not store.exists(ownership.OWNER)
