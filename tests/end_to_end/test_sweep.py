"""Real sweeps: `-m`, one Ray, one table."""

from __future__ import annotations

import json

import pytest
from launching import Launcher, steps_of, summary_of

pytestmark = pytest.mark.slow


def test_a_sweep_has_one_ray_and_a_table(launcher: Launcher) -> None:
    """Three learning rates, one of them nonsense: two jobs run, one is refused."""
    storage = launcher.storage
    ended = launcher.run(
        "-m",
        "optim.lr=1e-3,3e-3,-1",
        "parallelism=tp2_dp1",
        "train.max_steps=3",
        "tracker=none",
        "hydra.sweep.dir=sweep",
    )
    assert ended.code == 1, ended
    assert ended.err.splitlines() == ["error: job 2: optim.lr=-1: must be at least 0"], ended
    assert len(launcher.sessions()) == 1, "one Ray for all jobs"
    assert not launcher.processes()

    jobs = [
        json.loads((launcher.cwd / "sweep" / str(number) / "job.json").read_text())
        for number in range(3)
    ]
    assert [job["status"] for job in jobs] == ["done", "done", "refused"]
    assert len(list(storage.iterdir())) == 2
    table = ended.out[ended.out.index("3 jobs of") :].splitlines()
    losses = []
    for job, lr in zip(jobs[:2], ("0.001", "0.003"), strict=True):
        summary = summary_of(storage / job["run_dir"].rpartition("/")[2])
        assert summary["status"] == "finished" and job["objective"] == summary["validation_loss"]
        losses.append(job["objective"])
        (row,) = [line for line in table if job["run_dir"] in line]
        assert f"optim.lr={lr}" in row and f"{job['objective']:.4f}" in row
    assert losses[0] != losses[1]
    (row,) = [line for line in table if "optim.lr=-1" in line]
    assert "refused" in row


@pytest.mark.matrix
def test_a_sweep_over_layouts(launcher: Launcher) -> None:
    """The second job is larger than the first; with the same global batch, both learn the same."""
    ended = launcher.run(
        "-m",
        "parallelism=tp1_dp1,tp2_dp2",
        "train.global_batch_size=8",
        "train.max_steps=3",
        "tracker=none",
        "hydra.sweep.dir=sweep",
    )
    assert ended.code == 0 and ended.err == "", ended
    runs = sorted(launcher.storage.iterdir())
    assert [(summary_of(run)["world"], summary_of(run)["status"]) for run in runs] == [
        (1, "finished"),
        (4, "finished"),
    ]
    one, four = (steps_of(run) for run in runs)
    assert list(one) == list(four) == [1, 2, 3]
    for step, row in one.items():
        assert row["loss"] == pytest.approx(four[step]["loss"], rel=1e-5)
    table = ended.out[ended.out.index("2 jobs of") :]
    assert all(f"parallelism={layout}" in table for layout in ("tp1_dp1", "tp2_dp2")) and all(
        str(run) in table for run in runs
    )
