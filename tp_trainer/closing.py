"""The block that closes a run on the screen, made from the contents of summary.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tp_trainer.config.quoting import word
from tp_trainer.summary import Summary
from tp_trainer.view import duration, source_line


def summary_lines(summary: Summary) -> str:
    """The block that closes a run: the status, and a line for each thing that is known."""
    rows = [(name, text) for name, say in CLOSING if (text := say(summary)) is not None]
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(
        [
            str(summary.get("status", "done")),
            *(f"  {name:<{width}}  {value}" for name, value in rows),
        ]
    )


Say = Callable[[Summary], str | None]  # None: nothing to say


def _value(key: str, form: str = "{}") -> Say:
    """The value of a key in this form, where there is one."""

    def say(summary: Summary) -> str | None:
        value: Any = summary.get(key)
        return None if value is None else form.format(value)

    return say


def _data(summary: Summary) -> str | None:
    if summary.get("random_data"):
        return "random tokens: benchmark only"
    data = summary.get("data")
    return source_line(data) if data else None


def _unigram(summary: Summary) -> str | None:
    validation, unigram = summary.get("validation_loss"), summary.get("unigram_loss")
    if validation is None or unigram is None:
        return None if unigram is None else f"{unigram:.4f}"
    gap = unigram - validation
    return (
        f"{unigram:.4f} on the same text: the model is {abs(gap):.4f}"
        f" {'below' if gap >= 0 else 'ABOVE'} it"
    )


def _time(summary: Summary) -> str | None:
    wall, startup = summary.get("wall_seconds"), summary.get("startup_seconds")
    if wall is None:
        return None
    more = f", {duration(startup)} of it start-up" if startup is not None else ""
    return duration(wall) + more


def _workers(summary: Summary) -> str | None:
    world, mesh = summary.get("world"), summary.get("mesh")
    if world is None:
        return None
    named = ", ".join(f"{axis}={size}" for axis, size in (mesh or {}).items())
    return f"{world}" + (f" ({named})" if named else "")


def _restarts(summary: Summary) -> str | None:
    if not (restarts := summary.get("restarts")):
        return None if restarts is None else str(restarts)
    found = sum(summary.get("detection_seconds") or [])
    again = sum(summary.get("restart_seconds") or [])
    return (
        f"{restarts}: {summary.get('steps_lost', 0)} steps lost, noticed within"
        f" {duration(found)}, training again {duration(again)} later (sums); goodput"
        f" {summary.get('goodput') or 0:.0%}"
    )


def _skipped(summary: Summary) -> str | None:
    return ", ".join(summary.get("skipped_checkpoints") or []) or None


def _failed_saves(summary: Summary) -> str | None:
    if not (failed := summary.get("failed_saves")):
        return None
    return "; ".join(summary.get("missing_checkpoints") or [str(failed)])


def _tracker(summary: Summary) -> str | None:
    wrong = summary.get("tracker_error")
    return wrong and (
        f"{wrong['tracker']} failed since step {wrong['since_step']}, "
        f"{wrong['lost_rows']} rows lost ({wrong['reason']})"
    )


def _in_run_dir(form: str) -> Say:
    """A text about the run's directory, `{}` in the form."""

    def say(summary: Summary) -> str | None:
        run_dir = summary.get("run_dir")
        return None if run_dir is None else form.format(run_dir.rstrip("/"))

    return say


def _tensorboard(summary: Summary) -> str | None:
    run_dir, kind = summary.get("run_dir", "").rstrip("/"), summary.get("tracker")
    there = kind == "tensorboard" or (kind is None and Path(run_dir, "tensorboard").is_dir())
    return f"tensorboard --logdir {word(f'{run_dir}/tensorboard')}" if run_dir and there else None


def _go_on(summary: Summary) -> str | None:
    return summary.get("resume_command") if summary.get("status") != "finished" else None


CLOSING: tuple[tuple[str, Say], ...] = (
    ("steps", _value("steps", "{:,}")),
    ("tokens", _value("tokens", "{:,}")),
    ("data", _data),
    ("loss", _value("loss", "{:.4f}")),
    ("validation loss", _value("validation_loss", "{:.4f}")),
    ("unigram model", _unigram),
    ("time", _time),
    ("tokens/s", _value("tokens_per_second", "{:,.0f}")),
    ("workers", _workers),
    ("restarts", _restarts),
    ("resumed from", _value("resumed_from", "step {}")),
    ("skipped", _skipped),
    ("failed saves", _failed_saves),
    ("tracker", _tracker),
    ("run directory", _value("run_dir")),
    ("checkpoint", _value("checkpoint")),
    ("metrics", _in_run_dir("{}/metrics.jsonl")),
    ("config", _in_run_dir("{}/config.yaml")),
    ("tensorboard", _tensorboard),
    ("go on with", _go_on),
)
