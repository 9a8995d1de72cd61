"""Checkpoints under faults, at the level of a process group: damage is found, failures are
everybody's, nothing hangs.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tp_trainer.checkpoint import saving, snapshot, store
from tp_trainer.checkpoint.directory import Sink
from tp_trainer.checkpoint.files import local
from tp_trainer.checkpoint.layout import layout
from tp_trainer.checkpoint.manifest import checksum, render
from tp_trainer.checkpoint.saving import Checkpoints, SaveFailed
from tp_trainer.checkpoint.snapshot import Snapshots
from tp_trainer.checkpoint.state import RunState
from tp_trainer.checkpoint.store import Store, VerifiedCheckpoint
from tp_trainer.config import ConfigError

CPU = torch.device("cpu")


class Toy(nn.Module):
    """A sharded parameter, a replicated one, and one in another dtype."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(1)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.sharded = nn.Parameter(distribute_tensor(torch.randn(width, 8), mesh, [Shard(0)]))
        self.columns = nn.Parameter(distribute_tensor(torch.randn(6, width), mesh, [Shard(1)]))
        self.replicated = nn.Parameter(torch.randn(5))
        self.low = nn.Parameter(torch.randn(3, 3).bfloat16())


class Run:
    """A model that is trained a little, and its checkpoints."""

    def __init__(self, run_dir: str, width: int = 64, **options: Any) -> None:
        self.model = Toy(width)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.saves = Checkpoints(
            run_dir, options.pop("keep_last", 2), self.model, self.optimizer, CPU, **options
        )

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = parameter.detach() * 0.5
        self.optimizer.step()

    def save(self, step: int, last: bool = True) -> str | None:
        return self.saves.save(state_of(step), last)

    def everything(self) -> dict[str, torch.Tensor]:
        """This rank's part of all tensors, copied."""
        return {
            name: local(tensor).clone()
            for name, tensor in self.saves.tensors(with_rng=False).items()
        }

    def ended(self) -> saving.Saved:
        self.saves.wait()
        (saved,) = self.saves.done()
        return saved


def state_of(step: int, launch: str = "a", validation_loss: float | None = None) -> RunState:
    return RunState(step, 0, step, step, 8, launch=launch, validation_loss=validation_loss)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def first_rank(action: Callable[[], Any]) -> None:
    """Done by rank 0 alone, seen by all."""
    if dist.get_rank() == 0:
        action()
    dist.barrier()


# --------------------------------------------------------------------------------------------------


def damage_and_look(run_dir: str, trials: int, seed: int) -> list[str]:
    """Of two checkpoints the newer is damaged in some way, again and again. Returns the ways that
    were not found.
    """
    run, rng, missed = Run(run_dir), random.Random(seed), []
    for step in (1, 2):
        run.step()
        run.save(step)
    clean, target = Path(f"{run_dir}/step_00000002"), Path(f"{run_dir}/clean")
    first_rank(lambda: clean.rename(target))
    before = run.everything()
    kinds = ["bit", "truncate", "missing", "empty", "garbage", "swap bytes", "longer", "zeros"]
    files = sorted(each.name for each in target.iterdir())
    assert len(files) == 5  # two ranks' tensors, metadata, state, manifest
    for trial in range(trials):
        file, kind = files[trial % len(files)], kinds[trial // len(files) % len(kinds)]
        position, length = rng.random(), rng.random()
        if dist.get_rank() == 0:
            shutil.rmtree(clean, ignore_errors=True)
            shutil.copytree(target, clean)
            damage(clean / file, kind, position, length)
        dist.barrier()
        found, skipped = run.saves.newest()
        if found is None or found.step != 1 or not skipped[0].startswith("step_00000002 ("):
            missed.append(f"{kind} of {file} at {position}")
        refused = run.saves.pinned(str(clean))
        if isinstance(refused, VerifiedCheckpoint):
            missed.append(f"{kind} of {file}, pinned")
        dist.barrier()
    assert same(before, run.everything()), "no tensor was touched"
    return missed


def damage(path: Path, kind: str, position: float, length: float) -> None:
    content = bytearray(path.read_bytes())
    at = int(position * len(content))
    if kind == "missing":
        path.unlink()
        return
    if kind == "bit":
        content[at] ^= 1 << int(length * 8)
    elif kind == "truncate":
        del content[at:]
    elif kind == "empty":
        content.clear()
    elif kind == "garbage":
        content = bytearray(random.Random(position).randbytes(len(content)))
    elif kind == "swap bytes":
        content[at], content[-1] = content[at] ^ 0x55, content[-1] ^ 0x0A
    elif kind == "longer":
        content += b"\0"
    elif kind == "zeros":
        size = max(1, int(length * 512))
        part = content[at : at + size]
        content[at : at + size] = (b"\0" if any(part) else b"\1") * len(part)
    path.write_bytes(content)


def test_every_damage_is_found(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, damage_and_look, str(tmp_path / "run"), 240, 0) == [[], []]


def restore_forged(run_dir: str, forgeries: list[Any]) -> list[Any]:
    """What becomes of a checkpoint with a forged metadata.json whose checksums are right."""
    run, answers = Run(run_dir), []
    run.step()
    run.save(1)
    path = Path(f"{run_dir}/step_00000001")
    original = json.loads((path / "metadata.json").read_text())
    dist.barrier()
    for keys, value in forgeries:
        if dist.get_rank() == 0:
            content = json.loads(json.dumps(original))
            place = content
            for key in keys[:-1]:
                place = place[key]
            place[keys[-1]] = value
            forge(path, {"metadata.json": render(content)})
        dist.barrier()
        answers.append(run.saves.newest()[1])
        dist.barrier()
    return answers


def forge(path: Path, files: dict[str, bytes]) -> None:
    """Put files into a checkpoint as someone would who knows the format."""
    import xxhash

    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("checksum")
    for name, content in files.items():
        (path / name).write_bytes(content)
        manifest["files"][name] = {
            "bytes": len(content),
            "xxh3_128": xxhash.xxh3_128_hexdigest(content),
        }
    (path / "manifest.json").write_bytes(render({**manifest, "checksum": checksum(manifest)}))


def test_forged_metadata_is_damage(ranks: RankPool, tmp_path: Path) -> None:
    tensor, chunk = ("tensors", "model.sharded"), ("tensors", "model.sharded", "chunks", 0)
    forgeries: list[Any] = [
        (("tensors",), None),
        (("tensors",), [1]),
        (tensor, 3),
        ((*tensor, "dtype"), "object"),
        ((*tensor, "dtype"), ["x"]),
        ((*tensor, "shape"), [64, -8]),
        ((*tensor, "shape"), [1 << 70, 8]),
        ((*tensor, "shape"), "ab"),
        ((*tensor, "shape"), [64.0, 8]),
        ((*tensor, "chunks"), []),
        ((*tensor, "chunks"), {}),
        (chunk, None),
        ((*chunk, "file"), "../../secret"),
        ((*chunk, "file"), "/etc/passwd"),
        ((*chunk, "file"), "state.json"),
        ((*chunk, "file"), 3),
        ((*chunk, "file"), []),
        ((*chunk, "start"), -4),
        ((*chunk, "start"), 1 << 40),
        ((*chunk, "start"), True),
        ((*chunk, "bytes"), 8),
        ((*chunk, "offsets"), [40, 0]),
        ((*chunk, "offsets"), [0]),
        ((*chunk, "sizes"), [64, 8]),
    ]
    for skipped in ranks.run(2, restore_forged, str(tmp_path / "run"), forgeries)[0]:
        assert len(skipped) == 1 and skipped[0].startswith(
            "step_00000001 (damaged: metadata.json doesn't describe the files"
        )


class Bomb:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


def restore_with_pickles(run_dir: str, marker: str) -> Any:
    run = Run(run_dir)
    run.step()
    run.save(1)
    run.save(2)
    bomb = pickle.dumps(Bomb(marker))

    def plant() -> None:
        for name in (".metadata", "__0_0.distcp", "data.pkl"):
            for step in (1, 2):
                Path(f"{run_dir}/step_0000000{step}/{name}").write_bytes(bomb)
        forge(Path(f"{run_dir}/step_00000002"), {"metadata.json": bomb, "x.distcp": bomb})

    first_rank(plant)
    found, skipped = run.saves.newest()
    assert found is not None and found.step == 1 and "metadata.json" in skipped[0]
    run.saves.restore(found)
    dist.barrier()

    def state_too() -> None:
        forge(Path(f"{run_dir}/step_00000001"), {"state.json": bomb})

    first_rank(state_too)
    return run.saves.newest()


def test_nothing_is_unpickled(ranks: RankPool, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    found, skipped = ranks.run(2, restore_with_pickles, str(tmp_path / "run"), str(marker))[0]
    assert found is None and len(skipped) == 2 and not marker.exists()
    with pytest.raises(FileNotFoundError):  # the bomb does go off where it is unpickled
        pickle.loads(pickle.dumps(Bomb(str(tmp_path / "no" / "such"))))


def restore_other(run_dir: str) -> list[str]:
    """Into models that are not the checkpoint's."""
    run, refusals = Run(run_dir), []
    run.step()
    run.save(1)

    def other(change: Callable[[Run], None], width: int = 64) -> None:
        mine = Run(run_dir, width)
        change(mine)
        before = mine.everything()
        found = mine.saves.newest()[0]
        assert found is not None
        try:
            mine.saves.restore(found)
        except ConfigError as error:
            refusals.append(str(error))
        after = mine.everything()
        assert all(torch.equal(before[name], after[name]) for name in before), "nothing was loaded"

    other(lambda mine: None, width=32)
    other(lambda mine: mine.model.register_parameter("more", nn.Parameter(torch.ones(2))))
    other(lambda mine: delattr(mine.model, "replicated"))
    other(lambda mine: setattr(mine.model, "low", nn.Parameter(torch.ones(3, 3))))
    return refusals


def test_other_tensors_are_refused_by_name(ranks: RankPool, tmp_path: Path) -> None:
    for shape, more, fewer, dtype in ranks.run(2, restore_other, str(tmp_path / "run")):
        assert (
            "model.columns is float32 [6, 64] there and float32 [6, 32] here" in shape
            and "more" in shape
        )
        assert "model.more is missing there and float32 [2] here" in more
        assert "model.replicated is float32 [5] there and missing here" in fewer
        assert "model.low is bfloat16 [3, 3] there and float32 [3, 3] here" in dtype


# --------------------------------------------------------------------------------------------------


@contextmanager
def full_disk() -> Any:
    """Files of this process can't grow past some bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **more: Any) -> Any:
        raise error

    return fail


def broken(target: Any, name: str, error: Exception) -> Callable[[], Any]:
    return lambda: mock.patch.object(target, name, raising(error))


FAULTS: dict[str, tuple[int, Callable[[], Any], str]] = {
    "full disk": (1, full_disk, "rank 1: OSError: [Errno 27] File too large"),
    "full disk on rank 0": (0, full_disk, "rank 0: OSError: [Errno 27] File too large"),
    "makedirs": (
        0,
        broken(os, "makedirs", PermissionError("no directory")),
        "rank 0: PermissionError: no directory",
    ),
    "begin": (
        0,
        broken(Store, "begin", AssertionError("is there already")),
        "rank 0: AssertionError: is there already",
    ),
    "listing": (
        0,
        broken(Store, "check", ConnectionError("no storage")),
        "rank 0: ConnectionError: no storage",
    ),
    "rename": (0, broken(os, "rename", OSError("no rename")), "rank 0: OSError: no rename"),
    "fsync": (1, broken(os, "fsync", OSError("disk is gone")), "rank 1: OSError: disk is gone"),
    "commit": (
        0,
        broken(store, "render_manifest", MemoryError("no memory")),
        "rank 0: MemoryError: no memory",
    ),
    "copy": (
        1,
        broken(Snapshots, "take", RuntimeError("out of memory")),
        "rank 1: RuntimeError: out of memory",
    ),
}
"""What goes wrong on which rank, and what all ranks are told."""


def save_with_fault(run_dir: str, fault: str, last: bool) -> tuple[Any, ...]:
    """A good save, one that goes wrong on one rank, another good one."""
    run = Run(run_dir)
    rank, hinder, _ = FAULTS[fault]
    run.step()
    run.save(1)
    assert run.ended().path
    run.step()
    raised = None
    with hinder() if dist.get_rank() == rank else nullcontext():
        try:
            assert run.save(2, last) is None
        except SaveFailed as error:
            raised = str(error)
        saved = run.ended()
    dist.barrier()
    names = sorted(os.listdir(run_dir))
    found = run.saves.newest()[0]
    run.save(3, last=False)
    after = run.ended()
    return raised, saved.error, names, found.step if found else None, after.path


@pytest.mark.slow
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_fails_to_save_is_everybodys(
    ranks: RankPool, tmp_path: Path, fault: str, last: bool
) -> None:
    run_dir = str(tmp_path / "run")
    for raised, error, names, found, after in ranks.run(2, save_with_fault, run_dir, fault, last):
        assert FAULTS[fault][2] in error and found == 1
        assert raised == (f"checkpoint of step 2 failed: {error}" if last else None), (
            "the last save of a run must count"
        )
        assert names == ["step_00000001"], "what was written is gone again"
        assert after == f"{run_dir}/step_00000003"


def newest_of_launches(run_dir: str) -> list[int | None]:
    run = Run(run_dir, keep_last=9)
    for step, launch in enumerate("aab", 1):
        run.step()
        run.saves.save(state_of(step, launch))
    return [
        found.step if found else None for found, _ in map(run.saves.newest, (None, "a", "b", "c"))
    ]


def test_newest_of_one_launch(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, newest_of_launches, str(tmp_path)) == [[3, 2, 3, None]] * 2


def save_once_lost(run_dir: str) -> tuple[str | None, list[str]]:
    owned = [True]
    run = Run(run_dir, permitted=lambda: owned[0])
    run.step()
    run.save(1)
    owned[0] = False
    try:
        run.save(2)
    except SaveFailed as error:
        dist.barrier()  # rank 0 has cleared up
        return str(error), sorted(each.name for each in Path(run_dir).iterdir())
    return None, []


def test_who_lost_the_directory_publishes_nothing(ranks: RankPool, tmp_path: Path) -> None:
    for error, names in ranks.run(2, save_once_lost, str(tmp_path)):
        assert error is not None and "belongs to another process now" in error
        assert names == ["step_00000001"]


def plans_in_a_save(run_dir: str, prepared: bool) -> int:
    run = Run(run_dir)
    run.step()
    if prepared:
        run.saves.prepare()
    with mock.patch.object(saving, "layout", wraps=layout) as planned:
        for step in (1, 2):
            run.save(step)
    return planned.call_count


def test_the_plan_is_made_once_and_may_be_made_ahead(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, plans_in_a_save, str(tmp_path / "one"), False) == [1, 1]
    assert ranks.run(2, plans_in_a_save, str(tmp_path / "two"), True) == [0, 0]


def save_not_finite(run_dir: str) -> tuple[str | None, str | None]:
    run = Run(run_dir)
    run.step()
    errors = []
    for parameter, value in ((run.model.sharded, float("nan")), (run.model.low, float("-inf"))):
        kept = parameter.detach().clone()
        if dist.get_rank() == 1 or parameter is run.model.low:
            local(parameter)[-1, -1] = value
        run.save(1, last=False)
        errors.append(run.ended().error)
        with torch.no_grad():
            parameter.copy_(kept)
    assert not run.saves.store.step_names()
    with torch.no_grad():
        run.model.replicated.fill_(3e38)  # whose sum is no number
    run.save(1)
    return errors[0], errors[1]


def test_weights_that_are_not_finite_are_not_published(ranks: RankPool, tmp_path: Path) -> None:
    for sharded, half in ranks.run(2, save_not_finite, str(tmp_path / "run")):
        assert (
            sharded.startswith("rank 1: ValueError: sharded is not finite")
            and "low is not finite" in half
        )


@contextmanager
def slow_disk(seconds: float, gate: threading.Event | None = None) -> Any:
    """Each file takes so long to be closed, and none is before the gate is open."""
    original = Sink.close

    def close(self: Sink) -> Any:
        if gate is not None:
            gate.wait()
        time.sleep(seconds)
        return original(self)

    with mock.patch.object(Sink, "close", close):
        yield


def save_and_train_on(run_dir: str, asynchronous: bool) -> dict[str, Any]:
    run = Run(run_dir, asynchronous=asynchronous)
    run.step()
    run.save(1)  # which makes the plan
    asked: list[str] = []
    gather = dist.all_gather_object

    def all_gather_object(*arguments: Any, **more: Any) -> None:
        asked.append(threading.current_thread().name)
        gather(*arguments, **more)

    run.saves.done()
    gate = threading.Event()
    if not asynchronous:
        gate.set()
    with slow_disk(0.3, gate), mock.patch.object(dist, "all_gather_object", all_gather_object):
        run.step()
        expected, rng = run.everything(), torch.get_rng_state()
        path = run.save(2, last=False)
        running = run.saves._thread is not None and run.saves._thread.is_alive()
        there = run.saves.store.step_names()
        for _ in range(3):
            run.step()
            torch.rand(3)
        early = run.saves.done()
        threading.Timer(0.5, gate.set).start()
        run.save(3, last=False)  # waits for the one before
        waited = gate.is_set()
        (saved,) = [each for each in early + run.saves.done() if each.step == 2]
        run.saves.wait()
    dist.barrier()
    other = Run(run_dir)
    found = other.saves.store.check("step_00000002")
    assert isinstance(found, VerifiedCheckpoint)
    other.saves.restore(found)
    return {
        "exact": same(expected, other.everything()) and torch.equal(rng, torch.get_rng_state()),
        "path": path,
        "running": running,
        "there": there,
        "early": early,
        "waited": waited,
        "saved": saved,
        "asked": set(asked),
        "pauses": run.saves.pauses,
    }


def test_training_goes_on_while_the_copy_is_written(ranks: RankPool, tmp_path: Path) -> None:
    for seen in ranks.run(2, save_and_train_on, str(tmp_path / "run"), True):
        assert seen["exact"], "what was written is the state at the save, not of the steps since"
        assert (
            seen["running"]
            and seen["path"] is None
            and seen["early"] == []
            and "step_00000002" not in seen["there"]
        )
        assert seen["asked"] == {"save-2", "save-3"}, "the training thread asks no other rank"
        assert (
            seen["saved"].path
            and seen["saved"].pause_seconds < seen["saved"].seconds
            and seen["waited"]
        )
        assert seen["saved"].bytes > 3 * 4 * 64 * 14 and len(seen["pauses"]) == 3


def test_without_asynchronous_training_waits(ranks: RankPool, tmp_path: Path) -> None:
    for seen in ranks.run(2, save_and_train_on, str(tmp_path / "run"), False):
        assert seen["exact"] and not seen["running"] and "step_00000002" in seen["there"]
        assert seen["early"] == [seen["saved"]] and seen["saved"].pause_seconds > 0.5


def save_without_memory(run_dir: str) -> tuple[list[list[str]], list[float]]:
    with mock.patch.object(snapshot, "free_host_memory", lambda: 1000):
        run, notes = Run(run_dir), []
        for step in (1, 2):
            run.step()
            with slow_disk(0.1):
                run.save(step, last=False)
            notes.append(run.ended().notes)
    return notes, run.saves.pauses


def test_without_memory_for_a_copy_training_waits_and_says_so_once(
    ranks: RankPool, tmp_path: Path
) -> None:
    for notes, pauses in ranks.run(2, save_without_memory, str(tmp_path / "run")):
        assert notes == [
            ["no room for a copy of the state: training waits until checkpoints are written"],
            [],
        ]
        assert all(pause > 0.2 for pause in pauses)


def save_over(run_dir: str) -> tuple[list[str], Any, list[str]]:
    """The run goes on from step 1 since step 2 has a flipped bit, and comes to step 2 again."""
    run = Run(run_dir, keep_last=1)
    for step in (1, 2):
        run.step()
        run.saves.keep_last = 2
        run.save(step)
    first_rank(lambda: damage(Path(f"{run_dir}/step_00000002/00000_0000.distcp"), "bit", 0.5, 0.5))
    run = Run(run_dir, keep_last=1)
    found, _ = run.saves.newest()
    assert found is not None and found.step == 1
    run.saves.restore(found)
    run.save(2)
    notes = run.ended().notes
    dist.barrier()
    return notes, run.saves.newest()[1], run.saves.store.names()


def test_a_damaged_one_of_that_step_is_replaced(ranks: RankPool, tmp_path: Path) -> None:
    for notes, skipped, names in ranks.run(2, save_over, str(tmp_path / "run")):
        assert (
            notes == ["step_00000002 is there already, but damaged: it is written anew"]
            and skipped == []
            and names == ["step_00000002"]
        )


def go_on_before_a_damaged_one(run_dir: str) -> list[str]:
    run = Run(run_dir, keep_last=3)
    for step in (1, 9):
        run.step()
        run.save(step)
    first_rank(lambda: damage(Path(f"{run_dir}/step_00000009/00000_0000.distcp"), "bit", 0.5, 0.5))
    run = Run(run_dir, keep_last=2)
    found, _ = run.saves.newest()
    assert found is not None and found.step == 1
    run.save(4)
    dist.barrier()
    return run.saves.store.step_names()


def test_retention_counts_no_damaged_one(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, go_on_before_a_damaged_one, str(tmp_path / "run"))[0] == [
        "step_00000001",
        "step_00000004",
        "step_00000009",
    ]


def retain(run_dir: str) -> list[str]:
    run = Run(run_dir, keep_last=1, keep_every=4, keep_best=1)
    for step, loss in enumerate([5.0, 3.0, 4.0, 6.0, 7.0, 8.0], 1):
        run.saves.save(state_of(step, validation_loss=loss))
    return run.saves.store.step_names()


def test_retention(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, retain, str(tmp_path / "run"))[0] == [
        "step_00000002",
        "step_00000004",
        "step_00000006",
    ]


@pytest.mark.slow
def test_kills_during_saving_tear_and_lose_nothing() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "kill_during_save.py"
    if not script.exists():
        pytest.skip("benchmarks/ is not part of a source distribution")
    done = subprocess.run(
        [sys.executable, str(script), "kills=6", "seed=3"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(done.stdout)
    assert (
        (counts["kills"], counts["torn"], counts["lost"]) == (6, 0, 0)
        and counts["leftovers"]
        and counts["saved"]
    )
