"""Which directories count as checkpoints, and what becomes of the others. No torch."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tp_trainer.checkpoint.manifest import Entry, render, render_manifest
from tp_trainer.checkpoint.retention import keep
from tp_trainer.checkpoint.state import RunState
from tp_trainer.checkpoint.store import DRAFT, Store, VerifiedCheckpoint, at

SHARD = "00000_0000.distcp"


def state_of(step: int, **more: Any) -> RunState:
    return RunState(step, 0, 8 * step, 100 * step, 8, **more)


def put(store: Store, draft: str, file: str, content: bytes) -> dict[str, Entry]:
    with store.create(f"{draft}/{file}") as sink:
        sink.write(content)
        return {file: sink.close()}


def save(
    store: Store, step: int, warn: Callable[[str], None] = lambda text: None, **state: Any
) -> str:
    draft = store.begin(step)
    files = put(store, draft, SHARD, bytes(range(100))) | put(
        store, draft, "00001_0000.distcp", b"of another rank"
    )
    return store.commit(draft, state_of(step, **state), b"{}", files, warn=warn)


def write(store: Store, step: int, **state: Any) -> Path:
    return Path(save(store, step, **state))


@pytest.fixture(params=["local", "object store"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    return Store(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path}/run")


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    """A store whose files the tests may reach past it."""
    return Store(str(tmp_path / "run"))


def test_nothing_there(store: Store) -> None:
    assert store.newest() == (None, []) and store.step_names() == []


def test_newest_and_its_state(store: Store) -> None:
    save(store, 5)
    save(store, 100_000_000, launch="x")  # longer than the padding: by number, not by name
    save(store, 20)
    found, skipped = store.newest()
    assert (
        found
        == VerifiedCheckpoint(
            100_000_000, f"{store.run_dir}/step_100000000", state_of(100_000_000, launch="x")
        )
        and skipped == []
    )
    assert store.step_names() == ["step_00000005", "step_00000020", "step_100000000"]
    assert found.files[SHARD].bytes == 100 and found.name == "step_100000000"
    assert store.damage(found, found.files) is None


def test_a_checkpoint_appears_whole(store: Store) -> None:
    """Until the commit there is none, or one without a manifest."""
    draft = store.begin(3)
    files = put(store, draft, SHARD, b"x")
    assert store.newest()[0] is None and (store.step_names() == [] or not store.local)
    store.commit(draft, state_of(3), b"{}", files)
    assert store.newest()[0] is not None and store.step_names() == ["step_00000003"]


def test_what_does_not_count_is_passed_over_and_named(disk: Store) -> None:
    good, longer, shorter, gone, no_state, unfinished, link = (
        write(disk, step) for step in (1, 2, 3, 4, 5, 6, 7)
    )
    (longer / "metadata.json").write_bytes((longer / "metadata.json").read_bytes() + b" ")
    (shorter / SHARD).write_bytes(bytes(99))
    (gone / SHARD).unlink()
    (no_state / "state.json").write_text("x" * (no_state / "state.json").stat().st_size)
    (unfinished / "manifest.json").unlink()
    (link / SHARD).rename(disk.root + "/elsewhere")
    (link / SHARD).symlink_to(disk.root + "/elsewhere")
    found, skipped = disk.newest()
    assert found is not None and found.path == str(good)
    size = (longer / "metadata.json").stat().st_size
    assert skipped == [
        f"step_00000007 (damaged: {SHARD} is no plain file)",
        "step_00000006 (unfinished: it has no manifest)",
        "step_00000005 (damaged: state.json has another checksum)",
        f"step_00000004 (damaged: {SHARD} is missing)",
        f"step_00000003 (damaged: {SHARD} has 99 bytes, not 100)",
        f"step_00000002 (damaged: metadata.json has {size} bytes, not {size - 1})",
    ]


def test_bytes_that_changed_are_found_by_reading(store: Store) -> None:
    save(store, 1)
    found = store.check("step_00000001")
    assert isinstance(found, VerifiedCheckpoint)
    content = bytearray(store.read(f"step_00000001/{SHARD}"))
    content[50] ^= 1
    store.fs.pipe_file(f"{store.root}/step_00000001/{SHARD}", bytes(content))
    assert store.check("step_00000001") == found, "sizes say nothing"
    assert store.damage(found, found.files) == f"damaged: {SHARD} has another checksum"
    assert store.damage(found, ["metadata.json"]) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"{}",
        b'{"version": 2}',
        b"\x80\x04]q\x00.",
        b"NaN",
        b'{"version": 1, "step": 1, "files": {}}',
        b"9" * 10_000,
    ],
)
def test_a_manifest_of_nonsense_is_damage(store: Store, content: bytes) -> None:
    save(store, 1)
    for file in ("manifest.json", "state.json"):
        save(store, 2)
        store.fs.pipe_file(f"{store.root}/step_00000002/{file}", content)
        found, (skipped,) = store.newest()
        assert (
            found is not None
            and found.step == 1
            and skipped.startswith("step_00000002 (damaged: ")
            and file in skipped
        )
        store.remove("step_00000002")


def test_every_bit_of_the_small_files_counts(store: Store) -> None:
    save(store, 1)
    for file in ("manifest.json", "state.json"):
        path, content = f"{store.root}/step_00000001/{file}", store.read(f"step_00000001/{file}")
        more = [
            content + b"\n",
            content.replace(b"\n", b"\r\n"),
            content.replace(b" ", b"", 1),
            content[:-1],
        ]
        for bit in range(0, 8 * len(content), 1 if not store.local else 7):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            more.append(bytes(flipped))
        for other in more:
            store.fs.pipe_file(path, other)
            assert isinstance(store.check("step_00000001"), str), other
        store.fs.pipe_file(path, content)
        assert isinstance(store.check("step_00000001"), VerifiedCheckpoint)


def forged(path: Path, change: Any) -> None:
    """A manifest with its checksum in order, of another content."""
    from tp_trainer.checkpoint.manifest import checksum

    values = json.loads((path / "manifest.json").read_text())
    del values["checksum"]
    change(values)
    (path / "manifest.json").write_bytes(render({**values, "checksum": checksum(values)}))


@pytest.mark.parametrize(
    "name",
    ["../step_00000001/x", "/etc/passwd", "a/b", "..", ".", ".hidden", "", "a\\b", "a\0b", "ä"],
)
def test_names_cannot_leave_the_directory(disk: Store, name: str) -> None:
    path = write(disk, 1)
    forged(path, lambda values: values["files"].update({name: values["files"].pop(SHARD)}))
    assert str(disk.check("step_00000001")).startswith("damaged: manifest.json names ")


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(step=2),
        lambda v: v.update(files=[]),
        lambda v: v.update(files={}),
        lambda v: v["files"].pop("state.json"),
        lambda v: v["files"][SHARD].update(bytes=-1),
        lambda v: v["files"][SHARD].update(bytes="100"),
        lambda v: v["files"].update({SHARD: 3}),
        lambda v: v["files"][SHARD].update(xxh3_128=None),
        lambda v: v.update(version=3),
        lambda v: v["files"][SHARD].update(bytes=True),
    ],
)
def test_forged_manifests(disk: Store, change: Any) -> None:
    forged(path := write(disk, 1), lambda values: None)
    assert isinstance(disk.check(path.name), VerifiedCheckpoint)
    forged(path, change)
    assert str(disk.check(path.name)).startswith("damaged: manifest.json")


@pytest.mark.parametrize(
    "state",
    [
        {"step": 2},
        {"epoch": None},
        {"tokens": "7"},
        {"offset": -1},
        {"global_batch_size": True},
        {"epoch": 0.5},
    ],
)
def test_forged_states(store: Store, state: dict[str, Any]) -> None:
    rewritten(store, {**asdict(state_of(1)), **state})
    assert "damaged: state.json lacks one of" in str(store.check("step_00000001"))


def rewritten(store: Store, state: dict[str, Any]) -> None:
    """A checkpoint of step 1 whose state.json is of another content, its manifest in order."""
    found = store.check(save(store, 1).rpartition("/")[2])
    assert isinstance(found, VerifiedCheckpoint)
    content = render(state)
    entry = Entry(len(content), xxhash.xxh3_128_hexdigest(content))
    manifest = render_manifest(1, {**found.files, "state.json": entry})
    for file, bytes_ in (("state.json", content), ("manifest.json", manifest)):
        store.fs.pipe_file(f"{store.root}/step_00000001/{file}", bytes_)


def test_states_of_other_releases(store: Store) -> None:
    """One that lacks what came later, and one with what this release doesn't know."""
    counts = {"step": 1, "epoch": 2, "offset": 3, "tokens": 4, "global_batch_size": 5}
    for more in ({}, {"later": [1]}, {"validation_loss": True}):
        rewritten(store, counts | more)
        found = store.newest()[0]
        assert found is not None and found.state == RunState(1, 2, 3, 4, 5)
        store.remove(found.name)


def test_links_are_no_checkpoints_and_are_not_followed(disk: Store, tmp_path: Path) -> None:
    write(disk, 1)
    elsewhere = tmp_path / "elsewhere"
    write(Store(str(elsewhere)), 2)
    link = tmp_path / "run" / "step_00000002"
    link.symlink_to(elsewhere / "step_00000002")
    found, skipped = disk.newest()
    assert found is not None and found.step == 1 and "symbolic link" in skipped[0]
    assert "symbolic link" in str(at(str(link)))
    (tmp_path / "run" / f"{DRAFT}x").symlink_to(elsewhere)
    write(disk, 3)
    keep(disk, 1)
    assert disk.step_names() == ["step_00000003"] and isinstance(
        at(f"{elsewhere}/step_00000002"), VerifiedCheckpoint
    )
    write(disk, 4)
    os.symlink(elsewhere, tmp_path / "run" / "step_00000003" / "link")
    keep(disk, 1)
    assert isinstance(at(f"{elsewhere}/step_00000002"), VerifiedCheckpoint)


def test_a_whole_checkpoint_is_never_written_into(store: Store) -> None:
    save(store, 3)
    before = {file: store.read(f"step_00000003/{file}") for file in store.sizes("step_00000003")}
    with pytest.raises(AssertionError, match="is there already"):
        store.begin(3)
    assert {
        file: store.read(f"step_00000003/{file}") for file in store.sizes("step_00000003")
    } == before


def test_nor_is_one_that_has_come_meanwhile(disk: Store) -> None:
    draft = disk.begin(3)
    os.rename(f"{disk.root}/{draft}", f"{disk.root}/kept")  # begin clears away other drafts
    path = write(disk, 3)
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    os.rename(f"{disk.root}/kept", f"{disk.root}/{draft}")
    with pytest.raises(FileExistsError, match="meanwhile"):
        disk.commit(draft, state_of(3), b"{}", {})
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before


@pytest.mark.parametrize("replace", [False, True])
def test_what_does_not_count_makes_room(store: Store, replace: bool) -> None:
    save(store, 3)
    if not replace:
        store.remove("step_00000003/manifest.json")
    store.fs.pipe_file(
        f"{store.root}/step_00000003/00009_0000.distcp", b"of a rank that is no more"
    )
    draft = store.begin(3, replace=replace)
    store.commit(draft, state_of(3), b"{}", put(store, draft, SHARD, b"new"), replace=replace)
    assert set(store.sizes("step_00000003")) == {
        SHARD,
        "manifest.json",
        "metadata.json",
        "state.json",
    }
    assert store.names() == ["step_00000003"]


def test_leftovers_are_cleaned_and_block_nothing(
    disk: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = Path(disk.root, disk.begin(3))
    (left / SHARD).write_bytes(b"x")
    (tmp_path / "run" / f"{DRAFT}file").write_bytes(b"x")
    own = disk.begin(4)
    assert [each.name for each in Path(disk.root).iterdir()] == [own]
    monkeypatch.setattr(
        "shutil.rmtree", lambda path: (_ for _ in ()).throw(PermissionError("not yours"))
    )
    warnings: list[str] = []
    disk.begin(5, warn=warnings.append)
    assert warnings == [f"{own} can't be removed (not yours)"]


def test_keep_last(store: Store) -> None:
    for step in (10, 20, 30, 40):
        save(store, step)
    for step in (35, 50):  # unfinished; the second is perhaps being written
        store.write_text(f"step_{step:08d}/{SHARD}", "x")
    keep(store, 2)
    assert store.step_names() == ["step_00000030", "step_00000040", "step_00000050"]
    keep(store, 2)
    assert len(store.step_names()) == 3
    keep(store, 1)
    assert store.step_names() == ["step_00000040", "step_00000050"]


def test_keep_last_by_number(store: Store) -> None:
    for step in (99_999_999, 100_000_000):
        save(store, step)
    keep(store, 1)
    assert store.step_names() == ["step_100000000"]


def kept(store: Store) -> list[int]:
    return [int(name[5:]) for name in store.step_names()]


def test_keep_every(store: Store) -> None:
    for step in range(10, 80, 10):
        save(store, step)
        keep(store, 1, every=30)
    assert kept(store) == [30, 60, 70]


def test_keep_the_best(store: Store) -> None:
    losses = {10: 5.0, 20: 3.0, 30: 4.0, 40: 3.0, 50: None, 60: float(7)}
    for step, loss in losses.items():
        save(store, step, validation_loss=loss)
        keep(store, 1, best=1)
    assert kept(store) == [20, 60], "of equal ones the older: the loss was measured there"
    save(store, 70, validation_loss=3.5)
    keep(store, 1, best=2)
    assert kept(store) == [20, 70]
    save(store, 80, validation_loss="low")
    keep(store, 1, best=1)
    assert kept(store) == [20, 80]


def test_the_only_whole_one_stays(disk: Store) -> None:
    good, newer = write(disk, 10), write(disk, 20)
    (newer / SHARD).write_bytes(b"short")
    keep(disk, 1)
    assert good.exists() and newer.exists(), "a damaged one doesn't push out a whole one"
    write(disk, 30)
    keep(disk, 1)
    assert kept(disk) == [30]


def test_one_found_damaged_keeps_nothing(disk: Store) -> None:
    """Its sizes are right: only reading showed it."""
    write(disk, 10)
    write(disk, 30)
    write(disk, 20)  # the run went on from 10
    keep(disk, 2, damaged={"step_00000030"}, sure="step_00000020")
    assert kept(disk) == [10, 20, 30]
    # not known any more: what was just written stays all the same
    keep(disk, 1, sure="step_00000020")
    assert kept(disk) == [20, 30]


def test_the_manifest_goes_first(disk: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(disk, 10)
    write(disk, 20)
    monkeypatch.setattr(
        "shutil.rmtree", lambda path: (_ for _ in ()).throw(PermissionError("busy"))
    )
    warnings: list[str] = []
    keep(disk, 1, warn=warnings.append)
    assert (
        path.exists()
        and not (path / "manifest.json").exists()
        and warnings == ["step_00000010 can't be removed (busy)"]
    )


def test_a_checkpoint_by_its_path(store: Store) -> None:
    path = save(store, 8)
    found = at(f"{path}/")
    assert isinstance(found, VerifiedCheckpoint) and found.step == 8 and found.path == path
    assert at(store.run_dir) == "is no checkpoint: its name is not step_<number>"
    assert at(f"{store.run_dir}/step_00000009") == "is not there"


def test_other_names_are_no_checkpoints(disk: Store, tmp_path: Path) -> None:
    write(disk, 8)
    names = ("step_9", "step_00000009.part", "steps", "profile", "step_000000009", "step_٠٠٠٠٠٠٠٩")
    for name in names:
        (tmp_path / "run" / name).mkdir()
    keep(disk, 1)
    assert disk.step_names() == ["step_00000008"] and all(
        (tmp_path / "run" / name).exists() for name in names
    )


# ------------------------------------------------------- file systems that don't sync directories


def answering(
    monkeypatch: pytest.MonkeyPatch, call: str, number: int, of: Callable[[int], bool]
) -> None:
    """os.open or os.fsync fail with an errno, for directories or for files."""
    real = getattr(os, call)

    def failing(what: Any, *more: Any) -> Any:
        mode = os.stat(what).st_mode if isinstance(what, int) or os.path.exists(what) else 0
        if of(mode):
            raise OSError(number, os.strerror(number))
        return real(what, *more)

    monkeypatch.setattr(os, call, failing)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("fsync", errno.EINVAL),  # CIFS
        ("fsync", errno.ENOTSUP),
        ("fsync", errno.ENOSYS),  # FUSE without fsyncdir
        ("fsync", errno.EBADF),
        ("open", errno.EISDIR),
        ("open", errno.EACCES),
    ],
)
def test_directories_that_are_not_synced_are_told_once(
    disk: Store, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    answering(monkeypatch, call, number, stat.S_ISDIR)
    told: list[str] = []
    for step in (1, 2):
        save(disk, step, told.append)
    monkeypatch.undo()
    assert disk.step_names() == ["step_00000001", "step_00000002"]
    (line,) = told
    assert "doesn't sync directories" in line and os.strerror(number) in line


@pytest.mark.parametrize(
    ("number", "of"),
    [
        (errno.EIO, stat.S_ISDIR),
        (errno.ENOSPC, stat.S_ISDIR),
        (errno.ESTALE, stat.S_ISDIR),
        (errno.EINVAL, stat.S_ISREG),  # of files it stays strict
    ],
)
def test_what_else_goes_wrong_with_a_sync_fails_the_save(
    disk: Store, monkeypatch: pytest.MonkeyPatch, number: int, of: Callable[[int], bool]
) -> None:
    answering(monkeypatch, "fsync", number, of)
    with pytest.raises(OSError, match=os.strerror(number)):
        save(disk, 1)
