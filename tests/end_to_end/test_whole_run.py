"""`python launch.py` from start to end: what it says and leaves behind, going on with it, and
surviving kill -9.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal

import pytest
from launching import Launcher, Reference, copy_run, rows_of, steps_of, summary_of, the_run

from tp_trainer.checkpoint.store import Store, VerifiedCheckpoint

STEP_FIELDS = [
    "step",
    "epoch",
    "tokens",
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_second",
    "tokens_per_second_per_worker",
    "mfu",
    "memory_gib",
    "step_seconds",
]
EVALUATION_FIELDS = ["step", "validation_loss"]
SAVE_FIELDS = ["step", "checkpoint_pause_seconds", "checkpoint_seconds", "checkpoint_bytes"]
SUMMARY_FIELDS = [
    "status",
    "steps",
    "tokens",
    "loss",
    "validation_loss",
    "unigram_loss",
    "wall_seconds",
    "startup_seconds",
    "tokens_per_second",
    "restarts",
    "resumed_from",
    "skipped_checkpoints",
    "checkpoint",
    "world",
    "mesh",
    "skipped_steps",
    "failed_saves",
]


def test_what_a_run_leaves_behind(reference: Reference) -> None:
    run = reference.run
    assert (
        re.fullmatch(r"tiny-embedded-tp2_dp2-[0-9a-f]{8}", run.name)
        and run.parent == reference.launcher.cwd / "outputs"
    )
    assert [path.name for path in reference.launcher.cwd.iterdir()] == ["outputs"], (
        "nothing else in the working directory"
    )
    assert Store(str(run)).step_names() == ["step_00000008", "step_00000012"], "keep_last=2"
    assert all(
        isinstance(Store(str(run)).check(name), VerifiedCheckpoint)
        for name in Store(str(run)).step_names()
    )
    assert (
        not list(run.glob(".launch-*"))
        and not list(run.glob(".writable-*"))
        and not list(run.glob("*.part"))
    )
    assert "max_steps: 12\n" in (run / "config.yaml").read_text()

    rows = rows_of(run)
    steps = [row for row in rows if "loss" in row]
    (evaluation,) = [row for row in rows if "loss" not in row]
    assert all(list(row) == STEP_FIELDS for row in steps) and list(evaluation) == EVALUATION_FIELDS
    assert [row["step"] for row in steps] == list(range(1, 13)) and evaluation["step"] == 12
    assert [row["tokens"] for row in steps] == [256 * step for step in range(1, 13)], (
        "4 x 2 rows of 32 tokens"
    )
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert (
        max(map(len, re.findall(r'"loss": (\d+\.\d+)', (run / "metrics.jsonl").read_text()))) > 12
    ), "full precision"
    saves = rows_of(run, saves=True)
    assert [row["step"] for row in saves] == [4, 8, 12] and all(
        list(row) == SAVE_FIELDS for row in saves
    )
    assert all(
        0 < row["checkpoint_pause_seconds"] < 10 and row["checkpoint_seconds"] > 0 for row in saves
    )
    assert 1e7 < saves[-1]["checkpoint_bytes"] < 3e7, "1.2 million parameters, 12 bytes each"
    rate = steps[-1]["tokens_per_second"]
    assert rate == pytest.approx(256 / steps[-1]["step_seconds"]) and steps[-1][
        "tokens_per_second_per_worker"
    ] == pytest.approx(rate / 4)
    assert steps[-1]["mfu"] is None and 0.1 < steps[-1]["memory_gib"] < 4

    summary = summary_of(run)
    assert list(summary)[: len(SUMMARY_FIELDS)] == SUMMARY_FIELDS
    assert (summary["status"], summary["steps"], summary["tokens"]) == ("finished", 12, 256 * 12)
    assert (
        summary["loss"] == steps[-1]["loss"]
        and summary["validation_loss"] == evaluation["validation_loss"]
    )
    assert 6 < summary["unigram_loss"] < 7
    assert 0 < summary["startup_seconds"] < summary["wall_seconds"] < reference.ended.seconds
    assert (summary["restarts"], summary["resumed_from"], summary["skipped_checkpoints"]) == (
        0,
        None,
        [],
    )
    assert summary["checkpoint"] == str(run / "step_00000012")
    assert any(b'"goodput"' in file.read_bytes() for file in (run / "tensorboard").iterdir()), (
        "the tracker has the summary too"
    )
    assert re.fullmatch(
        "[0-9a-f]{32}", json.loads((run / "step_00000012" / "state.json").read_text())["data"]
    )
    assert (summary["world"], summary["mesh"]) == (4, {"dp": 2, "tp": 2})
    data = summary["data"]
    assert (data["source"], data["files"], data["tokenizer"]) == ("embedded", 1, "embedded")
    for part in (data["train"], data["validation"]):
        assert part["rows"] == (part["tokens"] - 1) // 32 > 0 and part["documents"] > 0
        assert part["tokens_dropped"] == part["tokens"] - 1 - 32 * part["rows"] < 32


def test_what_a_run_says(reference: Reference) -> None:
    out, summary = reference.ended.out, summary_of(reference.run)
    assert reference.ended.err == ""
    assert "\x1b" not in out and "\r" not in out, "plain lines where there is no terminal"
    assert f"{reference.run.name}: 12 steps on 4 cpu workers (dp=2 x tp=2)" in out.splitlines()
    rows = f"{summary['data']['train']['rows']:,} rows ("
    assert out.count("data: embedded Moby-Dick, 1 file\n") == out.count(rows) == 1, "once"
    assert [line.split(" ")[1] for line in out.splitlines() if " | loss " in line] == [
        f"{step}/12" for step in range(1, 13)
    ]
    closing = out[out.index("\nfinished\n") :]
    for what in (
        f"{summary['validation_loss']:.4f}",
        f"{summary['unigram_loss']:.4f} on the same text",
        str(reference.run),
    ):
        assert what in closing


def test_tensorboard_has_every_step(reference: Reference) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(reference.run / "tensorboard"))
    events.Reload()
    assert [each.step for each in events.Scalars("loss")] == list(range(1, 13))
    assert [each.step for each in events.Scalars("validation_loss")] == [12]
    for each in events.Scalars("loss"):
        assert each.value == pytest.approx(steps_of(reference.run)[each.step]["loss"])


@pytest.mark.slow
def test_the_same_command_again_says_finished(reference: Reference) -> None:
    before = {path: path.stat().st_mtime_ns for path in reference.run.rglob("*") if path.is_file()}
    sessions = reference.launcher.sessions()
    ended = reference.launcher.run(*reference.overrides)
    assert ended.code == 0 and ended.err == "" and ended.cpu_seconds < 5
    assert (
        ended.out.startswith(f"{reference.run.name}: this run has finished")
        and str(reference.run) in ended.out
    )
    assert reference.launcher.sessions() == sessions, "no Ray is started for that"
    assert {
        path: path.stat().st_mtime_ns for path in reference.run.rglob("*") if path.is_file()
    } == before


@pytest.mark.matrix
def test_kill_9_of_the_driver_and_of_a_worker(reference: Reference, launcher: Launcher) -> None:
    """Twice killed, the run ends as if nothing had been: same losses and gradient norms, bit by
    bit.
    """
    # so that what is killed is in the middle of it, however fast the machine
    slow = {"slow": 1, "from": 6}
    first = launcher.start(*reference.overrides, "tracker=none", orders=slow)
    launcher.until(
        lambda: launcher.storage.is_dir() and 5 in steps_of(the_run(launcher.storage)),
        running=first,
    )
    run = the_run(launcher.storage)
    assert run.name == reference.run.name and Store(str(run)).step_names() == ["step_00000004"]
    assert len(launcher.workers()) == 4
    os.kill(first.pid, signal.SIGKILL)
    ended = first.wait()
    assert ended.code == 128 + signal.SIGKILL and not (run / "summary.json").exists()
    launcher.until(lambda: not launcher.processes())

    second = launcher.start(*reference.overrides, "tracker=none", orders=slow)
    launcher.until(
        lambda: isinstance(Store(str(run)).check("step_00000008"), VerifiedCheckpoint),
        running=second,
    )
    launcher.until(lambda: 9 in steps_of(run), running=second)
    os.kill(launcher.workers()[1], signal.SIGKILL)
    ended = second.wait()
    assert ended.code == 0 and ended.err == "", ended
    assert not launcher.processes()
    assert ended.out.index("resumed from step 4") < ended.out.index(
        "workers restarted: going on from step 8"
    )

    summary, undisturbed = summary_of(run), summary_of(reference.run)
    assert (summary["status"], summary["steps"], summary["restarts"]) == ("finished", 12, 1)
    assert summary["resumed_from"] == 8
    seen, expected = steps_of(run), steps_of(reference.run)
    assert list(seen) == list(expected) == list(range(1, 13))
    for step, row in expected.items():
        for key in ("loss", "grad_norm", "lr", "tokens", "epoch"):
            assert seen[step][key] == row[key], f"{key} of step {step}"
    assert summary["validation_loss"] == undisturbed["validation_loss"]
    assert [row["step"] for row in rows_of(run)].count(9) == 2, "done again, and logged again"


@pytest.mark.slow
def test_a_saved_config_goes_on_in_another_layout(reference: Reference, launcher: Launcher) -> None:
    """Longer and as tp1_dp4, from a copy of the reference's directory; the global batch stays."""
    run = launcher.storage / reference.run.name
    copy_run(reference.run, run)
    saved = (
        "--config-path",
        str(run),
        f"checkpoint.storage_path={launcher.storage}",
        "parallelism.tp=1",
        "parallelism.dp=4",
    )

    refused = launcher.run(*saved, "train.max_steps=16")
    assert refused.code == 2 and refused.err.count("\n") == 1, refused
    assert refused.err.startswith(
        "error: train.global_batch_size=8: must be a multiple of"
    ) and refused.err.endswith("works: 1, 2\n")
    refused = launcher.run(
        "--config-path",
        str(run),
        f"checkpoint.storage_path={launcher.storage}",
        "optim.lr=1e-4",
        "train.max_steps=16",
    )
    assert refused.code == 2 and refused.err.count("\n") == 1 and refused.cpu_seconds < 5, refused
    assert refused.err.startswith("error: optim.lr=") and "was started with 0.003" in refused.err
    assert not launcher.sessions()

    ended = launcher.run(
        *saved,
        "train.micro_batch_size=2",
        "train.max_steps=16",
        "train.log_interval=10",
        "tracker.kind=none",
    )
    assert ended.code == 0 and ended.err == "", ended
    assert "resumed from step 12" in ended.out and "(dp=4 x tp=1)" in ended.out
    floor = steps_of(reference.run)[12]["lr"]
    assert (
        f"schedule: the run was to have 12 steps and now has 16: from step 12 at {floor:.2e} to"
        f" {floor:.2e} at step 16" in ended.out
    )
    assert [steps_of(run)[step]["lr"] for step in (13, 16)] == [
        floor,
        floor,
    ], "the unbroken run had come to its floor"
    summary, rows = summary_of(run), rows_of(run)
    assert (summary["steps"], summary["resumed_from"], summary["tokens"]) == (16, 12, 256 * 16)
    assert summary["mesh"] == {"dp": 4, "tp": 1}
    assert rows[: len(rows_of(reference.run))] == rows_of(reference.run), "appended"
    assert [row["step"] for row in rows[13:]] == [
        13,
        16,
        16,
    ], "the first and the last step, and the evaluation"
    assert json.loads((run / "step_00000016" / "state.json").read_text())["global_batch_size"] == 8


@pytest.mark.matrix
def test_a_checkpoint_that_only_reading_shows_to_be_damaged(
    reference: Reference, launcher: Launcher
) -> None:
    """It is the only one: the workers refuse, in a copy under another name that `--config-path`
    finds where it is.
    """
    run = launcher.storage / "copy"
    copy_run(reference.run, run)
    shutil.rmtree(run / "step_00000008")
    shard = run / "step_00000012" / "00001_0000.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    config = (run / "config.yaml").read_text()
    ended = launcher.run("--config-path", str(run), "train.max_steps=16", "parallelism=tp2_dp1")
    assert ended.code == 2 and ended.err.count("\n") == 1, ended
    refused = (
        f"error: checkpoint.resume=auto: {run} holds checkpoints, and none of them counts:"
        " step_00000012 (damaged: "
    )
    assert ended.err.startswith(refused), ended
    assert ended.out.startswith(
        f"{run} was {reference.run} when it was saved (moved or copied since):"
        " experiment_name=copy, checkpoint"
    )
    assert (
        "\nrefused\n" in ended.out
        and f"--config-path {run} train.max_steps=16 parallelism=tp2_dp1" in ended.out
    )
    assert (run / "config.yaml").read_text() == config and summary_of(run)[
        "status"
    ] == "finished", "as it was"


@pytest.mark.matrix
def test_a_pinned_checkpoint_begins_another_run(reference: Reference, launcher: Launcher) -> None:
    pinned = reference.run / "step_00000008"
    overrides = (
        "parallelism=tp2_dp1",
        "train.global_batch_size=8",
        f"checkpoint.resume={pinned}",
        "experiment_name=branch",
        *reference.overrides,
        "tracker=none",
    )
    ended = launcher.run(*overrides)
    assert ended.code == 0 and ended.err == "", ended
    run = the_run(launcher.storage)
    assert run.name == "branch" and summary_of(run)["resumed_from"] == 8
    seen, expected = steps_of(run), steps_of(reference.run)
    assert list(seen) == [9, 10, 11, 12]
    for step, row in seen.items():  # another layout: the same numbers but for the order of sums
        assert row["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)
        assert row["tokens"] == expected[step]["tokens"]
    assert sorted(path.name for path in reference.run.glob("step_*")) == [
        "step_00000008",
        "step_00000012",
    ], "left alone"
    for steps in (14, 16):  # requeued, twice
        ended = launcher.run(*overrides, f"train.max_steps={steps}")
        assert ended.code == 0 and ended.err == "", ended
        line = "this run was started from it, and goes on from its own step"
        assert f"{line} {steps - 2}" in ended.out, ended
        assert summary_of(run)["resumed_from"] == steps - 2


@pytest.mark.matrix
def test_dropout_of_a_shared_residual_stream_is_shared_and_checkpoints_by_the_clock(
    launcher: Launcher,
) -> None:
    """Without sequence parallelism a TP group holds the residual stream in common: other draws on
    each rank tear its replicas apart.
    """
    phi3 = [
        f"model.overrides.{each}"
        for each in ("model_type=phi3", "pad_token_id=0", "resid_pdrop=0.1")
    ]
    ended = launcher.run(
        *phi3,
        "parallelism=tp2_dp1",
        "parallelism.sequence_parallel=false",
        "train.max_steps=12",
        "train.drift_interval=1",
        "tracker=none",
        "checkpoint.interval=auto",
        "checkpoint.mtbf_hours=1e-6",
    )
    assert ended.code == 0, ended
    # a failure every 4 ms, or so it says: the clock asks for checkpoints all the time
    saved = [row["step"] for row in rows_of(the_run(launcher.storage), saves=True)]
    assert len(saved) > 1 and saved[-1] == 12 and saved[0] < 12
