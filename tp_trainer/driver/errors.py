"""Why the workers of a run failed: one line for the user, and all traces in failure.txt."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping

from tp_trainer.checkpoint.store import Store
from tp_trainer.config import ConfigError, OutOfMemory, Unrecoverable

# what a rank says whose peer is gone
LOST = re.compile("gloo|nccl|connection (closed|reset)", re.IGNORECASE)


class RunFailed(RuntimeError):
    """The run began and didn't end well. One line."""


def reason(error: Exception) -> str:
    """One line about why the workers failed."""
    failures = _of_workers(error)
    # when one rank fails, others lose their connection to it: they are not the cause
    order = sorted(
        failures,
        key=lambda rank: (
            not isinstance(failures[rank], Unrecoverable),
            bool(LOST.search(str(failures[rank]))),
            rank,
        ),
    )
    rank, first = (order[0], failures[order[0]]) if order else (None, error)
    # of a worker that is gone, Ray Train wraps Ray's own words
    cause = getattr(first, "health_check_failure", None) or first
    text = str(cause)
    if "ray::" in text:  # the trace of a task, of which the last line says what it was
        text = text.strip().splitlines()[-1]
    line = textwrap.shorten(
        text if isinstance(cause, Unrecoverable) else f"{type(cause).__name__}: {text}", 400
    )
    return f"{f'rank {rank}: ' if rank is not None else ''}{line}"


def refusal(error: Exception | None) -> ConfigError | None:
    """What a worker refused, if one did."""
    return next(
        (each for each in _of_workers(error).values() if isinstance(each, ConfigError)), None
    )


def is_permanent(error: Exception) -> bool:
    """Whether a worker failed by what would repeat for certain; it has judged that itself, by
    `config.permanent`."""
    return any(isinstance(each, Unrecoverable) for each in _of_workers(error).values())


def ran_out(error: Exception) -> bool:
    """Whether a worker's device memory didn't suffice for the first steps."""
    return any(isinstance(each, OutOfMemory) for each in _of_workers(error).values())


def failure(error: Exception, store: Store) -> str:
    """One line about why the workers failed; traces go to failure.txt in the run's directory."""
    failures = _of_workers(error)
    traces = {
        rank: "\n".join(getattr(each, "__notes__", [])) or f"{type(each).__name__}: {each}"
        for rank, each in failures.items()
    }
    try:
        store.write_text(
            "failure.txt",
            "\n\n".join(f"rank {rank}:\n{traces[rank]}" for rank in sorted(traces))
            + f"\n\n{error}\n",
        )
    except OSError as unwritten:  # the failure may be a full disk
        return f"{reason(error)} (failure.txt can't be written: {unwritten})"
    return f"{reason(error)} (all of it in {store.run_dir}/failure.txt)"


def _of_workers(error: Exception | None) -> Mapping[int, Exception]:
    return getattr(error, "worker_failures", None) or {}
