"""How a run ends that doesn't end well: a signal while it starts, an error in a worker. What it
survives: test_faults.py.
"""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from launching import Launcher, Running, steps_of, summary_of, the_run

pytestmark = pytest.mark.slow

SMALL = ("parallelism=tp2_dp1", "tracker=none", "train.max_steps=500")


def trains(launcher: Launcher, running: Running) -> None:
    """Wait until its workers train."""
    launcher.until(
        lambda: launcher.storage.is_dir() and 5 in steps_of(the_run(launcher.storage)),
        running=running,
    )
    assert len(launcher.workers()) == 2


@pytest.mark.matrix
def test_a_worker_that_dies_is_named(launcher: Launcher) -> None:
    """Its peers lose their connection to it, and must not be taken for the cause."""
    running = launcher.start(*SMALL, "cluster.max_failures=0")
    trains(launcher, running)
    os.kill(launcher.workers()[0], signal.SIGKILL)
    ended = running.wait()
    assert ended.code == 1 and ended.err.count("\n") == 1, ended
    assert re.match(r"error: rank [01]: .*died", ended.err), ended
    assert summary_of(the_run(launcher.storage))["status"] == "failed"


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)],
    ids=["SIGTERM", "Ctrl-C", "SIGHUP"],
)
def test_a_signal_while_it_starts(number: signal.Signals, code: int, launcher: Launcher) -> None:
    """Ray is there, the workers aren't yet."""
    running = launcher.start(*SMALL, "checkpoint.resume=never", "experiment_name=run")
    launcher.until(
        lambda: any("raylet" in title for title in launcher.processes().values()), running=running
    )
    (os.kill if number == signal.SIGTERM else os.killpg)(running.pid, number)
    ended = running.wait()
    assert ended.code == code and "Traceback" not in ended.out + ended.err, ended
    assert "stopped\n  steps" in ended.out and "launch.py" in ended.out.split("go on with")[1], (
        ended
    )
    launcher.until(lambda: not launcher.processes())


def test_an_error_in_a_worker_is_one_line_and_1(launcher: Launcher) -> None:
    ended = launcher.run(*SMALL, "cluster.max_failures=0", orders={"crash": 3, "rank": 1})
    run = the_run(launcher.storage)
    assert ended.code == 1, ended
    assert (
        ended.err == "error: rank 1: ArithmeticError: as ordered: the step went wrong (all of it in"
        f" {run}/failure.txt)\n"
    ), ended
    assert "Traceback" not in ended.out
    trace = (run / "failure.txt").read_text()
    assert (
        trace.startswith("rank 1:\n")
        and "Traceback (most recent call last)" in trace
        and "ArithmeticError: as ordered" in trace
    )
    assert not launcher.processes()
    summary = summary_of(run)
    assert (summary["status"], summary["steps"], summary["restarts"], summary["world"]) == (
        "failed",
        2,
        0,
        2,
    )
    assert summary["loss"] == steps_of(run)[2]["loss"] and summary["validation_loss"] is None


@pytest.mark.matrix
def test_an_error_that_would_repeat_is_not_tried_again(launcher: Launcher) -> None:
    """On one rank alone, while the other goes on to where it waits for that one."""
    ended = launcher.run(*SMALL, orders={"break": "tp_trainer.optim:build_optimizer", "rank": 1})
    run = the_run(launcher.storage)
    assert ended.code == 1, ended
    assert (
        ended.err == "error: rank 1: ValueError: as ordered: this can't be built "
        f"(all of it in {run}/failure.txt); "
        "a restart would come to the same\n"
    ), ended
    assert "restarted" not in ended.out and not launcher.processes()
    summary = summary_of(run)
    assert (summary["status"], summary["restarts"]) == ("failed", 0) and "ValueError" in summary[
        "failures"
    ][0]
    assert "in broken" in (run / "failure.txt").read_text()


@pytest.mark.matrix
def test_workers_that_do_not_see_the_storage(launcher: Launcher) -> None:
    """As on a node that hasn't mounted it: refused in one line that names the node, and not tried
    again.
    """
    run = launcher.storage / "unseen"
    told = launcher.cwd / "told"
    told.mkdir()
    ended = launcher.run(
        *SMALL, "experiment_name=unseen", orders={"forget": str(run), "tell": str(told)}
    )
    assert ended.code == 2 and ended.err.count("\n") == 1, ended
    assert ended.err.startswith(
        f"error: checkpoint.storage_path={launcher.storage}: node {os.uname().nodename} doesn't see"
        " what"
    ), ended
    assert "restarted" not in ended.out and not (run / "metrics.jsonl").exists()
    seen = [json.loads(path.read_text())["environ"] for path in told.iterdir()]
    assert len(seen) == 2 and all("TP_TEST_HOOK" in environ for environ in seen)
