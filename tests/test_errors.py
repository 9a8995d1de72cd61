"""Which errors of a worker a restart may heal: the rule, as a table; and what the driver makes of
them."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from configs import TINY_RUN
from ray.train.v2.api.exceptions import WorkerGroupError

from tp_trainer import watch
from tp_trainer.checkpoint.store import Store
from tp_trainer.config import Config, ConfigError, OutOfMemory, Unrecoverable, permanent
from tp_trainer.driver import workers
from tp_trainer.driver.errors import failure, is_permanent, ran_out, reason, refusal
from tp_trainer.messages import Start

ALWAYS = {"building", "first step", "training", "building again", "first step again"}
NEVER: set[str] = set()
BUILDING, MEMORY = {"building"}, {"building", "first step"}


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


class HTTPError(OSError):
    """As requests has it."""


HTTPError.__module__ = "requests.exceptions"
DISTRIBUTED = torch.distributed.DistBackendError


@pytest.mark.parametrize(
    ("error", "stages"),
    [
        # what was asked for, and what says so itself
        (ConfigError("optim.lr", 1, "too much"), ALWAYS),
        (Unrecoverable("diverged"), ALWAYS),
        # files that refuse: now or later, the same
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), ALWAYS),
        (PermissionError(errno.EACCES, "Permission denied", "x"), ALWAYS),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "x"), ALWAYS),
        (OSError(errno.ENOSPC, "No space left on device"), ALWAYS),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ALWAYS),
        (OSError(errno.EROFS, "Read-only file system"), ALWAYS),
        (OSError(errno.EIO, "Input/output error"), NEVER),
        (OSError(errno.ESTALE, "Stale file handle"), NEVER),
        (OSError("503 Service Unavailable"), NEVER),
        # packages that aren't there
        (ImportError("no kernels"), ALWAYS),
        (ModuleNotFoundError("No module named 'x'"), ALWAYS),
        # mistakes, ours or the user's: while building, what comes of them is certain
        (ValueError("x"), BUILDING),
        (TypeError("x"), BUILDING),
        (KeyError("x"), BUILDING),
        (IndexError("x"), BUILDING),
        (AttributeError("x"), BUILDING),
        (NotImplementedError("x"), BUILDING),
        (AssertionError("x"), BUILDING),
        (ZeroDivisionError("x"), BUILDING),
        (RuntimeError("The size of tensor a (4) must match the size of tensor b (3)"), BUILDING),
        # memory: enough for the first step is enough for the others
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MEMORY),
        (MemoryError(), MEMORY),
        # crashes
        (RuntimeError("CUDA error: an illegal memory access was encountered"), NEVER),
        (RuntimeError("NCCL error: unhandled system error"), NEVER),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), NEVER),
        (DISTRIBUTED("ncclRemoteError"), NEVER),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), NEVER),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), NEVER),
        (TimeoutError("timed out"), NEVER),
        (HTTPError("Max retries exceeded"), NEVER),
        # a file that is absent because the network is
        (
            raised_from(FileNotFoundError("not cached"), HTTPError("Name or service not known")),
            NEVER,
        ),
        (raised_from(ValueError("no config.json"), ConnectionError("refused")), NEVER),
    ],
)
def test_what_would_repeat_for_certain(error: Exception, stages: set[str]) -> None:
    every: list[Any] = sorted(ALWAYS)
    assert {stage for stage in every if permanent(error, stage)} == stages


def broken(config: Config, start: Start, progress: Any) -> None:
    stage, error = progress
    watch.came_to(stage)
    raise error


def failing(stage: str, error: Exception, restarts: int = 0) -> dict[str, Any]:
    """What Ray hands a worker whose recipe is `broken`."""
    return {
        "environment": {},
        "recipe": f"{__name__}:broken",
        "config": TINY_RUN,
        "start": Start("launch", "none", restarts),
        "progress": (stage, error),
    }


@pytest.mark.parametrize(
    ("stage", "restarts", "kind"),
    [
        ("building", 0, Unrecoverable),
        ("building", 1, ValueError),
        ("training", 0, ValueError),
    ],
)
def test_a_worker_raises_what_it_has_judged(stage: Any, restarts: int, kind: type) -> None:
    """Raised, not returned: a rank that ended well would leave the others waiting in a
    collective."""
    with pytest.raises(kind) as raised:
        workers._worker(failing(stage, ValueError("of no use"), restarts))
    watch.came_to("building")
    travelled = pickle.loads(pickle.dumps(raised.value))
    notes: list[str] = travelled.__notes__
    assert type(travelled) is kind and "in broken" in notes[0]
    assert reason(WorkerGroupError("", {3: travelled})) == "rank 3: ValueError: of no use"


@pytest.mark.parametrize(
    ("stage", "kind"), [("first step", OutOfMemory), ("training", torch.OutOfMemoryError)]
)
def test_memory_that_runs_out_at_first_may_do_for_a_leaner_start(stage: str, kind: type) -> None:
    with pytest.raises(kind) as raised:
        workers._worker(failing(stage, torch.OutOfMemoryError("CUDA out of memory.")))
    watch.came_to("building")
    travelled = WorkerGroupError("", {1: pickle.loads(pickle.dumps(raised.value))})
    assert ran_out(travelled) is is_permanent(travelled) is (kind is OutOfMemory)
    assert reason(travelled) == "rank 1: OutOfMemoryError: CUDA out of memory."


def test_a_refusal_on_a_worker_arrives_whole() -> None:
    with pytest.raises(ConfigError) as raised:
        workers._worker(failing("training", ConfigError("data.name", "x", "is empty")))
    watch.came_to("building")
    lost = RuntimeError("Connection closed by peer")
    refused = refusal(WorkerGroupError("", {0: lost, 1: pickle.loads(pickle.dumps(raised.value))}))
    assert refused is not None and (refused.key, refused.value, refused.message) == (
        "data.name",
        "x",
        "is empty",
    )
    assert refusal(WorkerGroupError("", {0: lost})) is None and refusal(None) is None


def test_the_cause_is_named_and_not_those_who_lost_it(tmp_path: Path) -> None:
    lost, cause = (
        RuntimeError("something odd"),
        Unrecoverable("OSError: [Errno 28] No space left on device"),
    )
    error = WorkerGroupError("", {0: lost, 1: cause})
    assert is_permanent(error) and not is_permanent(WorkerGroupError("", {0: lost}))
    line = failure(error, Store(str(tmp_path)))
    assert line.startswith("rank 1: OSError: [Errno 28] No space left on device (all of it in ")
