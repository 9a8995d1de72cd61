"""What goes wrong with workers, nodes, disks and the driver: each run ends with the losses of one
that nobody disturbed.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from launching import Launcher, Running, rows_of, steps_of, summary_of, the_run

pytestmark = pytest.mark.slow

STEPS = 14
SMALL = ("parallelism=tp2_dp1", "tracker=none", f"train.max_steps={STEPS}", "experiment_name=run")


@pytest.fixture(scope="module")
def clean(
    tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> Iterator[dict[int, dict[str, Any]]]:
    """The steps of an undisturbed run."""
    made = Launcher(tmp_path_factory.mktemp("clean"), cache)
    try:
        ended = made.run(*SMALL)
        assert ended.code == 0, ended
        yield steps_of(the_run(made.storage))
    finally:
        made.close()


def same(run: Path, clean: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The run finished with the losses of the undisturbed one, bit by bit. Returns its summary."""
    summary, seen = summary_of(run), steps_of(run)
    assert (summary["status"], summary["steps"]) == ("finished", STEPS)
    assert sorted(seen) == sorted(clean)
    for step, row in clean.items():
        for key in ("loss", "grad_norm", "lr", "tokens", "epoch"):
            assert seen[step][key] == row[key], f"{key} of step {step}"
    return summary


def started(launcher: Launcher, step: int, *overrides: str, **orders: Any) -> tuple[Running, Path]:
    """A run that has done `step`, and whose driver has heard that it has begun."""
    running = launcher.start(*SMALL, *overrides, orders=orders or None)
    run = launcher.storage / "run"
    launcher.until(lambda: any(row["step"] >= step for row in rows_of(run)), running=running)
    launcher.until(
        lambda: " steps on " in Path(f"/proc/{running.pid}/fd/1").read_text(), running=running
    )
    return running, run


def test_a_worker_that_is_killed_in_a_step_and_in_a_save_and_an_exception(
    launcher: Launcher, clean: dict[int, dict[str, Any]]
) -> None:
    """Three failures, with progress between them, and only one allowed in a row."""
    marks = launcher.cwd / "marks"
    marks.mkdir()
    ended = launcher.run(
        *SMALL,
        "cluster.max_failures=1",
        orders={
            "at": {"6": "kill", "8": "killsave", "11": "raise"},
            "rank": 1,
            "marks": str(marks),
        },
    )
    assert ended.code == 0 and ended.err == "", ended
    assert len(list(marks.iterdir())) == 3
    run = launcher.storage / "run"
    summary = same(run, clean)
    assert summary["restarts"] == 3 and len(summary["failures"]) == 3, ended
    assert (
        "ArithmeticError" in summary["failures"][2]
        and "ArithmeticError" not in summary["failures"][0]
    )
    assert len(summary["detection_seconds"]) == len(summary["restart_seconds"]) == 3
    # on 2 idle cores about 9
    assert all(0 < seconds < 100 for seconds in summary["restart_seconds"]), summary
    done = len([row for row in rows_of(run) if "loss" in row])
    assert summary["steps_lost"] == done - STEPS and 0 < summary["goodput"] < 1
    assert "workers restarted: going on from step 4" in ended.out and not launcher.processes()


@pytest.mark.matrix
def test_a_step_that_always_crashes(launcher: Launcher) -> None:
    ended = launcher.run(*SMALL, "cluster.max_failures=1", orders={"at": {"6": "raise"}, "rank": 0})
    assert ended.code == 1 and ended.err.count("\n") == 1, ended
    assert ended.err.startswith(
        "error: step 6 failed 2 times in a row: rank 0: ArithmeticError: as ordered"
    ), ended
    summary = summary_of(launcher.storage / "run")
    assert (summary["status"], summary["restarts"], len(summary["failures"])) == ("failed", 1, 2)
    assert (summary["steps"], summary["checkpoint"]) == (
        5,
        str(launcher.storage / "run" / "step_00000004"),
    )
    assert (
        "\nfailed\n" in ended.out
        and summary["resume_command"] in ended.out
        and summary["checkpoint"] in ended.out
    ), ended


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.matrix),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.matrix),
        pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.matrix),
    ],
    ids=["SIGTERM", "Ctrl-C", "SIGHUP", "SIGUSR1"],
)
def test_a_driver_that_is_told_to_stop(
    number: signal.Signals, code: int, launcher: Launcher, clean: dict[int, dict[str, Any]]
) -> None:
    """It saves within one step, and the same command goes on from there."""
    running, run = started(launcher, 5, slow=0.5)
    done = max(steps_of(run))
    # a terminal or Slurm sends it to Ray's servers too
    (os.kill if number == signal.SIGTERM else os.killpg)(running.pid, number)
    ended = running.wait()
    assert ended.code == code and ended.err == "", ended
    assert "stopping: saving, again to end at once" in ended.out
    launcher.until(lambda: not launcher.processes())
    summary = summary_of(run)
    assert summary["status"] == "stopped" and done <= summary["steps"] <= done + 2
    assert (
        summary["checkpoint"] == str(run / f"step_{summary['steps']:08d}")
        and (run / f"step_{summary['steps']:08d}").is_dir()
    )
    assert summary["resume_command"] in ended.out and "go on with" in ended.out, ended
    if number == signal.SIGTERM:
        _, *command = shlex.split(summary["resume_command"])
        ended = launcher.execute([sys.executable, *command]).wait()
        assert ended.code == 0 and f"resumed from step {summary['steps']}" in ended.out, ended
        same(run, clean)


@pytest.mark.matrix
def test_a_second_signal_ends_it_at_once(launcher: Launcher) -> None:
    running, run = started(launcher, 1, slow=10)
    os.kill(running.pid, signal.SIGTERM)
    launcher.until(lambda: "stopping" in Path(f"/proc/{running.pid}/fd/1").read_text(), running)
    os.kill(running.pid, signal.SIGINT)
    ended = running.wait()
    assert ended.code == 130, ended
    launcher.until(lambda: not launcher.processes())
    assert not (run / "summary.json").exists()


@pytest.mark.matrix
def test_a_sigterm_after_a_notice_is_no_second_signal(launcher: Launcher) -> None:
    """As from Slurm, whose time limit follows its --signal."""
    running, run = started(launcher, 1, slow=4)
    os.killpg(running.pid, signal.SIGUSR1)
    launcher.until(lambda: "stopping" in Path(f"/proc/{running.pid}/fd/1").read_text(), running)
    os.kill(running.pid, signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 138 and ended.err == "", ended
    summary = summary_of(run)
    assert summary["status"] == "stopped" and summary["checkpoint"] == str(
        run / f"step_{summary['steps']:08d}"
    )
    launcher.until(lambda: not launcher.processes())


@pytest.mark.matrix
def test_a_stop_that_does_not_come_about(launcher: Launcher) -> None:
    running, run = started(launcher, 1, "cluster.stop_seconds=4", at={"3": "hang"})
    launcher.until(lambda: 2 in steps_of(run), running=running)
    os.kill(running.pid, signal.SIGTERM)
    ended = running.wait()
    assert (
        ended.code == 143
        and "no sign of life for 4 s (cluster.stop_seconds): ending unsaved" in ended.out
    ), ended
    launcher.until(lambda: not launcher.processes())


@pytest.mark.matrix
def test_a_worker_that_is_told_to_leave(
    launcher: Launcher, clean: dict[int, dict[str, Any]]
) -> None:
    """As on a machine that is taken away: all ranks save, and nothing is done twice."""
    running, run = started(launcher, 5, "cluster.max_failures=0", slow=0.5)
    os.kill(launcher.workers()[1], signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 0 and "a worker was told to end: saved at step" in ended.out, ended
    summary = same(run, clean)
    assert (summary["restarts"], summary["steps_lost"], summary["failures"]) == (1, 0, [])
    assert len(rows_of(run)) == STEPS + 1


@pytest.mark.matrix
def test_a_rank_that_hangs(launcher: Launcher, clean: dict[int, dict[str, Any]]) -> None:
    marks = launcher.cwd / "marks"
    marks.mkdir()
    ended = launcher.run(
        *SMALL,
        "cluster.hang_seconds=8",
        "cluster.max_failures=1",
        orders={"at": {"6": "hang"}, "rank": 1, "marks": str(marks)},
    )
    assert ended.code == 0, ended
    run = launcher.storage / "run"
    summary = same(run, clean)
    assert summary["restarts"] == 1 and summary["failures"][0].startswith(
        "hung at step 5: no sign of life for 8 s"
    ), summary
    assert 8 < summary["detection_seconds"][0] < 40
    stacks = {path.name.rpartition("-")[2]: path.read_text() for path in (run / "stacks").iterdir()}
    assert (
        sorted(stacks) == ["rank0.txt", "rank1.txt"]
        and "train_step" in stacks["rank0.txt"]
        and "sitecustomize" in stacks["rank1.txt"]
    )


@pytest.mark.matrix
@pytest.mark.parametrize("ranks", [1, 2], ids=["one", "all"])
def test_ranks_that_are_stopped(
    ranks: int, launcher: Launcher, clean: dict[int, dict[str, Any]]
) -> None:
    """SIGSTOP: they hear no alarm, and Ray can't end them. Of one, its peer's alarm goes off; of
    all, the driver must do it.
    """
    running, run = started(
        launcher, 5, "cluster.hang_seconds=8", "cluster.max_failures=1", slow=0.5
    )
    for pid in launcher.workers()[-ranks:]:
        os.kill(pid, signal.SIGSTOP)
    ended = running.wait()
    assert ended.code == 0, ended
    summary = same(run, clean)
    assert summary["restarts"] == 1 and "hung at step" in summary["failures"][0], summary
    assert not launcher.processes()


@pytest.mark.matrix
def test_a_killed_driver_and_the_same_command_at_once(
    launcher: Launcher, clean: dict[int, dict[str, Any]]
) -> None:
    """The workers of the killed one live for some seconds more. Meanwhile a third command of that
    name is sent away.
    """
    running, run = started(launcher, 6, slow=0.5)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    again = launcher.start(*SMALL)
    launcher.until(
        lambda: "taking over from process" in Path(f"/proc/{again.pid}/fd/1").read_text(), again
    )
    third = launcher.run(*SMALL)
    assert third.code == 2 and third.err.count("\n") == 1 and third.cpu_seconds < 5, third
    assert third.err.startswith(
        f"error: experiment_name=run: is being trained by process {again.pid} on"
        f" {os.uname().nodename}, since 2"
    )
    ended = again.wait()
    assert ended.code == 0 and f"taking over from process {running.pid}" in ended.out, ended
    # the workers may still have saved step 8
    assert re.search("resumed from step [48]", ended.out), ended
    same(run, clean)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("may not mount a file system of its own")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.matrix
def test_a_full_disk(
    launcher: Launcher, clean: dict[int, dict[str, Any]], small_disk: Path
) -> None:
    """The run fails and says why; once there is room it goes on."""
    storage = small_disk / "runs"
    command = (*SMALL, f"checkpoint.storage_path={storage}", "cluster.max_failures=1")
    running = launcher.start(*command, orders={"slow": 0.5})
    launcher.until(lambda: 5 in steps_of(storage / "run"), running=running)
    with suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(b"x" * 4096)
    ended = running.wait()
    assert ended.code == 1 and ended.err.count("\n") == 1 and "No space left" in ended.err, ended
    assert "a restart would come to the same" in ended.err and "restarted" not in ended.out
    assert not launcher.processes()
    (small_disk / "filler").unlink()
    ended = launcher.run(*command)
    assert ended.code == 0 and "resumed from step 4" in ended.out, ended
    same(storage / "run", clean)


@pytest.mark.matrix
def test_a_node_that_is_lost(launcher: Launcher, clean: dict[int, dict[str, Any]]) -> None:
    """Its raylet is killed while the run trains there; another node has come by then."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    launcher.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-this-test"}
    base = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
    where = [
        "--include-dashboard=false",
        f"--temp-dir={launcher.ray_dir}/ray",
        f"--port={address.rpartition(':')[2]}",
    ]

    def raylets() -> int:
        return sum("/raylet " in title for title in launcher.processes().values())

    def node(*arguments: str) -> Running:
        count = raylets()
        started = launcher.execute([*base, *arguments], launcher.env | launcher.hook_env)
        launcher.until(
            lambda: (
                raylets() > count and "--block" in Path(f"/proc/{started.pid}/fd/1").read_text()
            ),
            started,
        )
        return started

    launcher.orders.write_text("{}")
    node("--head", "--num-cpus=0", *where)
    lost = node(f"--address={address}", "--num-cpus=2")
    running, run = started(
        launcher, 5, "cluster=ray", f"cluster.address={address}", "cluster.wait_seconds=60", slow=1
    )
    assert len(launcher.workers()) == 2
    node(f"--address={address}", "--num-cpus=2")
    (raylet,) = [
        pid
        for pid, title in launcher.processes().items()
        if "/raylet " in title and f"PPid:\t{lost.pid}\n" in Path(f"/proc/{pid}/status").read_text()
    ]
    os.kill(raylet, signal.SIGKILL)
    ended = running.wait()
    assert ended.code == 0 and "workers restarted: going on from step" in ended.out, ended
    assert same(run, clean)["restarts"] >= 1
