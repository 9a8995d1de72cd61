"""Which directories count as checkpoints, and what becomes of the others. No torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tp_trainer.checkpoint.store import Found, Store, at


def write(store: Store, step: int, **state: object) -> Path:
    path = Path(store.begin(step))
    (path / "__0_0.distcp").write_bytes(bytes(range(100)))
    (path / ".metadata").write_bytes(b"metadata")
    store.commit(step, {"step": step, **state})
    return path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def test_nothing_there(store: Store) -> None:
    assert store.newest() == (None, []) and store.step_names() == []


def test_newest_and_its_state(store: Store, tmp_path: Path) -> None:
    write(store, 5)
    write(store, 100_000_000, tokens=7)  # longer than the padding: by number, not by name
    write(store, 20)
    found, skipped = store.newest()
    assert found == Found(100_000_000, f"{tmp_path}/run/step_100000000", {"step": 100_000_000, "tokens": 7}) and skipped == []
    assert store.step_names() == ["step_00000005", "step_00000020", "step_100000000"]


def test_what_does_not_count_is_passed_over_and_named(store: Store) -> None:
    good, longer, shorter, gone, no_state, unfinished = (write(store, step) for step in (1, 2, 3, 4, 5, 6))
    (longer / ".metadata").write_bytes(b"metadata and more")
    (shorter / "__0_0.distcp").write_bytes(bytes(99))
    (gone / "__0_0.distcp").unlink()
    (no_state / "state.json").write_text("x" * (no_state / "state.json").stat().st_size)
    (unfinished / "manifest.json").unlink()
    found, skipped = store.newest()
    assert found is not None and found.path == str(good)
    assert skipped == [
        "step_00000006 (unfinished: it has no manifest)",
        "step_00000005 (damaged: state.json can't be read)",
        "step_00000004 (damaged: __0_0.distcp is missing)",
        "step_00000003 (damaged: __0_0.distcp has 99 bytes, not 100)",
        "step_00000002 (damaged: .metadata has 17 bytes, not 8)",
    ]


def test_truncated_manifest(store: Store) -> None:
    path = write(store, 1)
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])
    assert store.newest() == (None, ["step_00000001 (unfinished: it has no manifest)"])


def test_a_whole_checkpoint_is_never_written_into(store: Store) -> None:
    path = write(store, 3)
    before = {each.name: each.read_bytes() for each in path.iterdir()}
    with pytest.raises(AssertionError, match="is there already"):
        store.begin(3)
    assert {each.name: each.read_bytes() for each in path.iterdir()} == before


def test_an_unfinished_one_is_cleared_away_first(store: Store) -> None:
    path = write(store, 3)
    (path / "manifest.json").unlink()
    (path / "__1_0.distcp").write_bytes(b"of a rank that is no more")
    assert store.begin(3) == str(path)
    assert list(path.iterdir()) == []


def test_keep_last(store: Store) -> None:
    for step in (10, 20, 30, 40):
        write(store, step)
    unfinished = Path(store.begin(35))
    later = Path(store.begin(50))  # being written
    (later / "__0_0.distcp").write_bytes(b"x")
    store.keep_last(2)
    assert store.step_names() == ["step_00000030", "step_00000040", "step_00000050"]
    assert not unfinished.exists() and later.exists()
    store.keep_last(2)
    assert len(store.step_names()) == 3
    store.keep_last(1)
    assert store.step_names() == ["step_00000040", "step_00000050"]


def test_keep_last_by_number(store: Store) -> None:
    for step in (99_999_999, 100_000_000):
        write(store, step)
    store.keep_last(1)
    assert store.step_names() == ["step_100000000"]


def test_newest_of_one_launch(store: Store) -> None:
    write(store, 1, launch="a")
    write(store, 2, launch="a")
    write(store, 3, launch="b")
    assert [found.step for found, _ in (store.newest(), store.newest("a"), store.newest("b")) if found] == [3, 2, 3]
    assert store.newest("c") == (None, [])


def test_a_checkpoint_by_its_path(store: Store, tmp_path: Path) -> None:
    path = write(store, 8)
    found = at(f"{path}/")
    assert isinstance(found, Found) and found.step == 8
    assert at(str(tmp_path / "run")) == "is no checkpoint: its name is not step_<number>"
    assert "no manifest" in str(at(str(tmp_path / "run" / "step_00000009")))


def test_other_names_are_no_checkpoints(store: Store, tmp_path: Path) -> None:
    write(store, 8)
    for name in ("step_9", "step_00000009.part", "steps", "profile"):
        (tmp_path / "run" / name).mkdir()
    store.keep_last(1)
    assert store.step_names() == ["step_00000008"] and (tmp_path / "run" / "step_9").exists()


def test_on_another_file_system() -> None:
    store = Store("memory://bucket/run")
    store.begin(1)
    store.write_text("step_00000001/__0_0.distcp", "x")
    store.commit(1, {"step": 1})
    found, skipped = store.newest()
    assert found == Found(1, "memory://bucket/run/step_00000001", {"step": 1}) and skipped == []
