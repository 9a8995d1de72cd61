"""The view on the driver: plain lines, the live bar on a forced terminal, and the closing block."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from configs import TINY_RUN
from rich.console import Console

from tp_trainer.closing import summary_lines
from tp_trainer.config import load
from tp_trainer.messages import Evaluated, StepDone, StepLogged
from tp_trainer.summary import Summary
from tp_trainer.view import View, data_lines

ROW = StepLogged(
    step=10,
    epoch=0,
    tokens=20480,
    loss=7.12345,
    grad_norm=1.5,
    lr=3e-4,
    tokens_per_second=12345.6,
    tokens_per_second_per_worker=3086.4,
    mfu=None,
    memory_gib=0.528,
    step_seconds=0.16,
)


def play(view: View, *news: StepDone | StepLogged | Evaluated | str) -> None:
    view.start(546, load(TINY_RUN), 4, "cpu")
    for each in news:
        if isinstance(each, str):
            view.say(each)
        else:
            view.update(each)
    view.close()


def test_plain_lines_one_per_row() -> None:
    out = io.StringIO()
    play(
        View(Console(file=out, width=40)),
        StepDone(9, 0.1),
        ROW,
        "[bold] node lost",
        Evaluated(100, 6.5),
        replace(ROW, step=546, mfu=0.4123, loss=None),
    )
    # narrow as it is, nothing is wrapped
    first, ten, notice, evaluation, last = out.getvalue().splitlines()
    assert first == "tiny-run: 546 steps on 4 cpu workers (dp=2 x tp=2)"
    figures = (
        "loss 7.1235 | grad norm 1.500 | lr 3.00e-04 | 12,346 tokens/s | 3,086 tokens/s/worker |"
        " 0.53 GiB"
    )
    assert re.fullmatch(re.escape(f"step 10/546 | {figures}") + r" \| \S+ (s|min|h) left", ten)
    assert (notice, evaluation) == ("[bold] node lost", "step 100/546 | validation loss 6.5000")
    assert last.startswith("step 546/546 | loss nan | ") and last.endswith("0.53 GiB | MFU 41.2%")
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("width", [80, 140])
def test_live_bar_on_a_terminal(width: int) -> None:
    out = io.StringIO()
    view = View(Console(file=out, width=width, height=24, force_terminal=True, color_system=None))
    play(
        view,
        replace(ROW, mfu=0.4123),
        Evaluated(100, 6.5),
        "worker 3 restarted",
        StepDone(120, 0.1),
    )
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\u00a0", " ")
    above, screen = shown.splitlines(), shown.rsplit("step 120/546", 1)[1]
    assert "worker 3 restarted" in above and "step 100/546 | validation loss 6.5000" in above
    assert re.search(r"━.* 22%, \S+ (s|min|h) left", screen)
    for figure in [
        "loss 7.1235",
        "validation 6.5000",
        "12,346 tokens/s",
        "3,086 tokens/s/worker",
        "MFU 41.2%",
        "0.53 GiB",
    ]:
        assert figure in screen, figure
    assert max(len(line.rstrip()) for line in above) <= width


def test_time_left_follows_the_pace_and_starts_anew_after_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("tp_trainer.view.time.monotonic", lambda: clock[0])
    view = View(Console(file=io.StringIO()))
    view.start(100, load(TINY_RUN), 4, "cpu")
    for step, now in [(10, 100.0), (20, 120.0)]:
        clock[0] = now
        view.update(StepDone(step, 0.1))
    assert view._left() == ["2:40 min left"]  # 80 steps at 2 s
    clock[0] = 500.0
    view.update(
        StepDone(15, 0.1)
    )  # the restart took 380 s and went back: neither counts for the pace
    assert view._left() == []
    clock[0] = 505.0
    view.update(StepDone(20, 0.1))
    assert view._left() == ["1:20 min left"]


def test_summary_names_the_numbers_and_where_everything_lies() -> None:
    summary: Summary = {
        "status": "finished",
        "steps": 546,
        "tokens": 1118208,
        "loss": 4.81234,
        "validation_loss": 5.2,
        "unigram_loss": 6.54,
        "wall_seconds": 185.0,
        "startup_seconds": 18.4,
        "tokens_per_second": 6789.0,
        "restarts": 1,
        "resumed_from": 200,
        "steps_lost": 7,
        "detection_seconds": [2.0],
        "restart_seconds": [14.4],
        "goodput": 0.834,
        "skipped_checkpoints": ["step_300"],
        "checkpoint": "/runs/tiny/step_546",
        "world": 4,
        "mesh": {"dp": 2, "tp": 2},
        "run_dir": "/runs/tiny",
        "tracker": "tensorboard",
    }
    text = summary_lines(summary)
    for part in [
        "finished",
        "546",
        "1,118,208",
        "4.8123",
        "5.2000",
        "6.5400 on the same text: the model is 1.3400 below it",
        "3:05 min, 18 s of it start-up",
        "1: 7 steps lost, noticed within 2.0 s, training again 14 s later (sums); goodput 83%",
        "6,789",
        "4 (dp=2, tp=2)",
        "step 200",
        "step_300",
        "/runs/tiny/step_546",
        "/runs/tiny/metrics.jsonl",
        "/runs/tiny/config.yaml",
        "tensorboard --logdir /runs/tiny/tensorboard",
    ]:
        assert part in text, part
    assert "random" not in text
    assert "random tokens: benchmark only" in summary_lines({**summary, "random_data": True})
    assert "ABOVE" in summary_lines({**summary, "validation_loss": 7.0})
    assert "tensorboard" not in summary_lines({**summary, "tracker": "none"})


def test_summary_of_a_run_that_failed_early() -> None:
    assert (
        summary_lines({"status": "failed", "steps": 0, "loss": None, "mesh": None})
        == "failed\n  steps  0"
    )


def test_the_data_in_two_lines_and_in_the_closing_block() -> None:
    part: dict[str, Any] = {"documents": 1, "tokens": 1234, "rows": 9, "tokens_dropped": 81}
    part |= {"documents_skipped": 0, "skipped": {}, "first_skipped": []}
    data: Any = {"source": "hub", "name": "owner/set", "revision": "abc", "files": None}
    data |= {"files_ignored": 0, "first_ignored": [], "tokenizer": "owner/model"}
    data |= {"train": part, "validation": part}
    what, amounts = data_lines(data)
    assert what == "data: hub owner/set at abc"
    each = "1 document, 1,234 tokens, 9 rows (81 tokens left over at the end)"
    assert amounts == f"tokenizer owner/model: train {each}; validation {each}"
    skipping = {**part, "documents_skipped": 2, "skipped": {"null": 2}}
    data |= {"files": 2, "train": {**skipping, "first_skipped": ["a:1", "a:2"]}}
    what = data_lines(data)[0]
    assert what == "data: hub owner/set at abc, 2 files; skipped 2 (2 null): a:1, a:2"
    assert "\n  data   hub owner/set at abc" in summary_lines({"steps": 3, "data": data})


def test_a_screen_that_is_gone_ends_nothing() -> None:
    """As in `python launch.py | head`: the reader has ended, the run goes on and ends as it
    would."""
    program = f"""
import sys
from tp_trainer.config import load
from tp_trainer.view import View
view = View()
view.start(2, load({TINY_RUN}), 4, "cpu")
sys.stdin.read()
for step in (1, 2):
    view.say("something" * 10_000)
view.close()
view.say("finished")
print("to nobody")
sys.exit(7)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout and process.stderr
    assert process.stdout.readline() == b"tiny-run: 2 steps on 4 cpu workers (dp=2 x tp=2)\n"
    process.stdout.close()
    process.stdin.close()
    assert process.wait() == 7 and process.stderr.read() == b""


def test_the_closing_block_names_what_went_wrong_outside() -> None:
    block = summary_lines(
        {
            "status": "finished",
            "failed_saves": 1,
            "missing_checkpoints": ["step 8: rank 0: OSError: 503"],
            "tracker_error": {
                "tracker": "mlflow",
                "reason": "no answer for 20 s",
                "since_step": 12,
                "lost_rows": 30,
            },
        }
    )
    assert "  failed saves  step 8: rank 0: OSError: 503" in block
    assert "  tracker       mlflow failed since step 12, 30 rows lost (no answer for 20 s)" in block
