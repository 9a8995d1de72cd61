"""A whole run on S3: its directory is a URL, and nothing of it lies here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launching import Launcher

from tp_trainer.checkpoint.store import Store, VerifiedCheckpoint

sys.path.append(str(Path(__file__).parent.parent))

from object_store import BUCKET, s3_server

pytest.importorskip("moto")
pytest.importorskip("s3fs")


@pytest.mark.matrix
def test_a_run_on_s3_and_its_resume(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as env:
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        settings = (
            "parallelism=tp1_dp2",
            f"checkpoint.storage_path=s3://{BUCKET}/runs",
            "experiment_name=a",
            "tracker=none",
        )
        ended = launcher.run(*settings, "train.max_steps=6", env={**launcher.env, **env})
        assert (
            ended.code == 0 and "checkpoint       s3://bucket/runs/a/step_00000006" in ended.out
        ), ended
        store = Store(f"s3://{BUCKET}/runs/a")
        found = store.check("step_00000006")
        assert isinstance(found, VerifiedCheckpoint) and store.damage(found, found.files) is None
        sizes = [store.fs.size(path) for path in store.fs.find(store.root)]
        assert sum(sizes) < 2.05 * sum(entry.bytes for entry in found.files.values()), (
            "two checkpoints, and no byte twice"
        )

        ended = launcher.run(*settings, "train.max_steps=9", env={**launcher.env, **env})
        assert ended.code == 0 and "resumed from step 6" in ended.out, ended
        assert store.step_names() == ["step_00000008", "step_00000009"]
        rows = [json.loads(line) for line in store.read("metrics.jsonl").splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10))
        assert {row["step"] for row in rows if "checkpoint_bytes" in row} == {4, 6, 8, 9}
        assert not launcher.storage.exists()
