"""The view on the driver: plain lines, the live bar on a forced terminal, and the closing block."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from tp_trainer.config import Config
from tp_trainer.view import View, summary_lines

ROW = {
    "step": 10, "epoch": 0, "tokens": 20480, "loss": 7.12345, "grad_norm": 1.5, "lr": 3e-4, "tokens_per_second": 12345.6,
    "tokens_per_second_per_worker": 3086.4, "mfu": None, "memory_gib": 0.528, "step_seconds": 0.16,
}  # fmt: skip


def play(view: View, *rows: dict[str, Any]) -> None:
    view.start(546, Config(experiment_name="tiny-run"), 4, "cpu")
    for row in rows:
        view.update(row)
    view.close()


def test_plain_lines_one_per_row() -> None:
    out = io.StringIO()
    play(View(Console(file=out, width=40)), {"step": 9}, ROW, {"event": "[bold] node lost"}, {"step": 100, "validation_loss": 6.5},
         {**ROW, "step": 546, "mfu": 0.4123, "loss": None})  # fmt: skip
    first, ten, notice, evaluation, last = out.getvalue().splitlines()  # narrow as it is, nothing is wrapped
    assert first == "tiny-run: 546 steps on 4 cpu workers (dp=2 x tp=2)"
    figures = "loss 7.1235 | grad norm 1.500 | lr 3.00e-04 | 12,346 tokens/s | 3,086 tokens/s/worker | 0.53 GiB"
    assert re.fullmatch(re.escape(f"step 10/546 | {figures}") + r" \| \S+ (s|min|h) left", ten)
    assert (notice, evaluation) == ("[bold] node lost", "step 100/546 | validation loss 6.5000")
    assert last.startswith("step 546/546 | loss nan | ") and last.endswith("0.53 GiB | MFU 41.2%")
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("width", [80, 140])
def test_live_bar_on_a_terminal(width: int) -> None:
    out = io.StringIO()
    view = View(Console(file=out, width=width, height=24, force_terminal=True, color_system=None))
    play(view, {**ROW, "mfu": 0.4123}, {"step": 100, "validation_loss": 6.5}, {"event": "worker 3 restarted"}, {"step": 120})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\u00a0", " ")
    above, screen = shown.splitlines(), shown.rsplit("step 120/546", 1)[1]
    assert "worker 3 restarted" in above and "step 100/546 | validation loss 6.5000" in above
    assert re.search(r"━.* 22%, \S+ (s|min|h) left", screen)
    for figure in ["loss 7.1235", "validation 6.5000", "12,346 tokens/s", "3,086 tokens/s/worker", "MFU 41.2%", "0.53 GiB"]:
        assert figure in screen, figure
    assert max(len(line.rstrip()) for line in above) <= width


def test_time_left_follows_the_pace_and_starts_anew_after_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("tp_trainer.view.time.monotonic", lambda: clock[0])
    view = View(Console(file=io.StringIO()))
    view.start(100, Config(), 4, "cpu")
    for step, now in [(10, 100.0), (20, 120.0)]:
        clock[0] = now
        view.update({"step": step})
    assert view._left() == ["2:40 min left"]  # 80 steps at 2 s
    clock[0] = 500.0
    view.update({"step": 15})  # the restart took 380 s and went back: neither counts for the pace
    assert view._left() == []
    clock[0] = 505.0
    view.update({"step": 20})
    assert view._left() == ["1:20 min left"]


def test_summary_names_the_numbers_and_where_everything_lies() -> None:
    summary = {
        "status": "done", "steps": 546, "tokens": 1118208, "loss": 4.81234, "validation_loss": 5.2, "unigram_loss": 6.54,
        "wall_seconds": 185.0, "startup_seconds": 18.4, "tokens_per_second": 6789.0, "restarts": 1, "resumed_from": 200,
        "steps_lost": 7, "detection_seconds": [2.0], "restart_seconds": [14.4], "goodput": 0.834,
        "skipped_checkpoints": ["step_300"],
        "checkpoint": "/runs/tiny/step_546", "world": 4, "mesh": {"dp": 2, "tp": 2}, "run_dir": "/runs/tiny", "tracker": "tensorboard",
    }  # fmt: skip
    text = summary_lines(summary)
    for part in [
        "done", "546", "1,118,208", "4.8123", "5.2000", "6.5400 on the same text: the model is 1.3400 below it",
        "3:05 min, 18 s of it start-up",
        "1: 7 steps lost, noticed within 2.0 s, training again 14 s later (sums); goodput 83%",
        "6,789", "4 (dp=2, tp=2)", "step 200", "step_300", "/runs/tiny/step_546", "/runs/tiny/metrics.jsonl", "/runs/tiny/config.yaml",
        "tensorboard --logdir /runs/tiny/tensorboard",
    ]:  # fmt: skip
        assert part in text, part
    assert "random" not in text
    assert "random tokens: benchmark only" in summary_lines({**summary, "random_data": True})
    assert "ABOVE" in summary_lines({**summary, "validation_loss": 7.0})
    assert "tensorboard" not in summary_lines({**summary, "tracker": "none"})


def test_summary_of_a_run_that_failed_early() -> None:
    assert summary_lines({"status": "failed", "steps": 0, "loss": None, "mesh": None}) == "failed\n  steps  0"
