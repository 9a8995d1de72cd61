"""How a run ends that began and didn't end well."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping

from tp_trainer.checkpoint.store import Store

LOST = re.compile("gloo|nccl|connection (closed|reset)", re.IGNORECASE)  # what a rank says whose peer is gone


class RunFailed(RuntimeError):
    """The run began and didn't end well. One line."""


def reason(error: Exception) -> str:
    """One line about why the workers failed."""
    failures = _of_workers(error)
    # when one rank fails, others lose their connection to it: they are not the cause
    order = sorted(failures, key=lambda rank: (bool(LOST.search(str(failures[rank]))), rank))
    rank, first = (order[0], failures[order[0]]) if order else (None, error)
    cause = getattr(first, "health_check_failure", None) or first  # of a worker that is gone, Ray Train wraps Ray's own words
    text = str(cause)
    if "ray::" in text:  # the trace of a task, of which the last line says what it was
        text = text.strip().splitlines()[-1]
    line = textwrap.shorten(f"{type(cause).__name__}: {text}", 400)
    return f"{f'rank {rank}: ' if rank is not None else ''}{line}"


def failure(error: Exception, store: Store) -> str:
    """One line about why the workers failed; the traces go to failure.txt in the run's directory."""
    failures = _of_workers(error)
    traces = {rank: "\n".join(getattr(each, "__notes__", [])) or f"{type(each).__name__}: {each}" for rank, each in failures.items()}
    try:
        store.write_text("failure.txt", "\n\n".join(f"rank {rank}:\n{traces[rank]}" for rank in sorted(traces)) + f"\n\n{error}\n")
    except OSError as unwritten:  # the failure may be a full disk
        return f"{reason(error)} (failure.txt can't be written: {unwritten})"
    return f"{reason(error)} (all of it in {store.run_dir}/failure.txt)"


def _of_workers(error: Exception) -> Mapping[int, Exception]:
    return getattr(error, "worker_failures", None) or {}
