"""Checkpoints on S3, where nothing can be renamed: the manifest, written last, is what makes one
count.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from plain_reference import FAMILIES, saved, settings_of
from rank_cases import trainer
from rank_pool import RankPool
from safetensors.torch import load_file
from test_checkpoints import raising
from test_resume import STATE, checkpoints, differing, everything

from tp_trainer.checkpoint.directory import Sink
from tp_trainer.checkpoint.store import Store, VerifiedCheckpoint
from tp_trainer.config import Cluster, ConfigError, load, to_yaml
from tp_trainer.tasks import export

sys.path.append(str(Path(__file__).parent.parent))

from object_store import BUCKET, s3_server

pytest.importorskip("moto")
pytest.importorskip("s3fs")

RUN = f"s3://{BUCKET}/runs/test"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    import s3fs

    with s3_server() as env:
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        s3fs.S3FileSystem.clear_instance_cache()  # of an earlier server
        yield env
        s3fs.S3FileSystem.clear_instance_cache()


def on_s3(env: dict[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs on a rank."""
    import s3fs

    waits = (
        mock.patch("botocore.retryhandler.delay_exponential", at_once)
        if "AT_ONCE" in env
        else nullcontext()
    )
    with mock.patch.dict(os.environ, env), waits:
        s3fs.S3FileSystem.clear_instance_cache()
        return function(*arguments)


def save_some(settings: dict[str, Any], run_dir: str) -> Any:
    """Steps 1 to 3, in the background; a save of step 4 that fails on rank 1 after its files are
    there.
    """
    made = trainer(settings)
    saves = checkpoints(made, run_dir)
    for step in (1, 2, 3):
        made.step()
        saves.save(replace(STATE, step=step), last=False)
    saves.wait()
    state = everything(made)
    made.step()
    lost = mock.patch.object(Sink, "close", raising(ConnectionError("connection lost")))
    with lost if torch.distributed.get_rank() == 1 else nullcontext():
        saves.save(replace(STATE, step=4), last=False)
        saves.wait()
    return state, [each.error for each in saves.done()], saves.store.step_names()


def restored(settings: dict[str, Any], run_dir: str) -> Any:
    made = trainer({**settings, "seed": 7})
    saves = checkpoints(made, run_dir)
    found, skipped = saves.newest()
    assert found is not None
    saves.restore(found)
    return found.step, skipped, everything(made)


@pytest.mark.slow
def test_save_resume_keep_tear_and_damage(ranks: RankPool, s3: dict[str, str]) -> None:
    settings = settings_of(FAMILIES["qwen2_tied"], 2, 1)
    state, errors, names = ranks.run(2, on_s3, s3, save_some, settings, RUN)[0]
    assert errors[:3] == [None] * 3 and "rank 1: ConnectionError: connection lost" in errors[3]
    assert names == [
        "step_00000002",
        "step_00000003",
    ], "the last two stay, and nothing of the failed one"
    store = Store(RUN)
    found, skipped = store.newest()
    assert (
        found is not None
        and found.step == 3
        and skipped == []
        and store.damage(found, found.files) is None
    )
    for tp, dp in ((2, 1), (1, 2), (1, 1)):
        step, skipped, after = ranks.run(
            tp * dp, on_s3, s3, restored, settings_of(FAMILIES["qwen2_tied"], tp, dp), RUN
        )[0]
        assert step == 3 and skipped == [] and differing(state, after) == []

    # bytes that changed: sizes don't show it, reading does
    shard = next(file for file in found.files if file.endswith(".distcp"))
    path = f"{store.root}/step_00000003/{shard}"
    content = bytearray(store.fs.cat_file(path))
    content[len(content) // 3] ^= 4
    store.fs.pipe_file(path, bytes(content))
    step, skipped, _ = ranks.run(2, on_s3, s3, restored, settings, RUN)[0]
    assert step == 2 and skipped == [f"step_00000003 (damaged: {shard} has another checksum)"]
    store.fs.rm_file(path)
    assert f"{shard} is missing" in ranks.run(2, on_s3, s3, restored, settings, RUN)[0][1][0]
    store.fs.rm_file(f"{store.root}/step_00000003/manifest.json")
    assert ranks.run(2, on_s3, s3, restored, settings, RUN)[0][1] == [
        "step_00000003 (unfinished: it has no manifest)"
    ]


def save_through_failures(settings: dict[str, Any], run_dir: str) -> Any:
    """Steps 1 to 5, each by itself. What became of each, as a user hears it."""
    made = trainer(settings)
    saves = checkpoints(made, run_dir)
    for step in range(1, 6):
        made.step()
        saves.save(replace(STATE, step=step), last=False)
        saves.wait()
    return saves.done()


@pytest.mark.slow
def test_a_third_of_all_requests_fails(ranks: RankPool) -> None:
    """Nothing is lost by it but time, and the user hears of it: one line a save."""
    import s3fs

    run = f"{RUN}-flaky"  # the server's memory is one for all tests
    with s3_server(failing=0.35) as env:
        settings = settings_of(FAMILIES["qwen2_tied"], 2, 1)
        # S3's client waits up to 64 s between its attempts
        done = ranks.run(2, on_s3, {**env, "AT_ONCE": "1"}, save_through_failures, settings, run)[0]
        with (
            mock.patch.dict(os.environ, env),
            mock.patch("botocore.retryhandler.delay_exponential", at_once),
        ):
            s3fs.S3FileSystem.clear_instance_cache()
            store = Store(run)
            there = [
                name
                for name in store.step_names()
                if isinstance(store.check(name), VerifiedCheckpoint)
            ]
        s3fs.S3FileSystem.clear_instance_cache()
    assert [each.error for each in done] == [None] * 5
    assert there == [
        "step_00000004",
        "step_00000005",
    ], "all were written, and the last two are kept"
    for each in done:
        said = [
            note
            for note in each.notes
            if note.endswith("requests to the storage failed and were made again")
        ]
        assert len(said) == 1 and said[0].startswith(f"step_{each.step:08d}: ")


def at_once(*_: Any, **__: Any) -> float:
    return 0.0


def save_untouched(settings: dict[str, Any], run_dir: str) -> None:
    checkpoints(trainer(settings), run_dir).save(STATE)


def test_export_from_there(
    ranks: RankPool,
    s3: dict[str, str],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_of(saved(models, "qwen2"), 1, 2)
    ranks.run(2, on_s3, s3, save_untouched, settings, RUN)
    store = Store(RUN)
    store.write_text("config.yaml", to_yaml(load(settings)))

    def run_jobs(
        cluster: Cluster, function: Callable[[Any], Any], jobs: list[Any], memory: list[int]
    ) -> list[Any]:
        return [function(job) for job in jobs]

    monkeypatch.setattr(export, "run_jobs", run_jobs)

    def exported(name: str) -> Path:
        asked = {"output": str(tmp_path / name), "dtype": "float32"}
        keys = settings_of(
            FAMILIES["qwen2"], checkpoint={"path": f"{RUN}/step_00000003"}, export=asked
        )
        export.run(load({**keys, "task": "export"}))
        return tmp_path / name

    there, here = (
        load_file(exported("out") / "model.safetensors"),
        load_file(Path(saved(models, "qwen2")) / "model.safetensors"),
    )
    assert there.keys() == here.keys() and all(
        torch.equal(there[name], here[name]) for name in here
    )
    found = store.check("step_00000003")
    assert isinstance(found, VerifiedCheckpoint)
    shard = f"{store.root}/step_00000003/00000_0000.distcp"
    content = bytearray(store.fs.cat_file(shard))
    content[0] ^= 1
    store.fs.pipe_file(shard, bytes(content))
    with pytest.raises(ConfigError, match=r"damaged: 00000_0000\.distcp has another checksum"):
        exported("again")
