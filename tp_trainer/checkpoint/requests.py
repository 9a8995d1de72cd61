"""Requests to a storage: made again where they fail by chance, and counted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import fsspec

from tp_trainer.checkpoint.manifest import Damaged
from tp_trainer.config import lasting

T = TypeVar("T")
AGAIN_SECONDS = (0.5, 2.0, 5.0)  # after a request that failed, before it is made again
S3_ATTEMPTS = 8  # of each request, by S3's client: a part of a large file nobody else sends again
_again = [0]  # requests of this process that failed and were made again


def made_again() -> int:
    """How many requests of this process to storages failed and were made again."""
    return _again[0]


def again(fs: Any, action: Callable[[], T]) -> T:
    """Do to a file system what may be done twice, and do it again where it fails by chance.

    Raises the last error, or the first that is certain to come again.
    """
    counts = count_failures(fs)
    for seconds in (*AGAIN_SECONDS, None):
        try:
            fs.invalidate_cache()
            return action()
        except Exception as error:  # every storage has its own
            chance = not lasting(error) and not isinstance(error, (Damaged, AssertionError))
            if seconds is None or not chance:
                raise
            _again[0] += not counts
            time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def options(url: str) -> dict[str, dict[str, object]]:
    """Of S3's client more attempts than its own 5, unless its user has said how many."""
    if not url.startswith(("s3://", "s3a://")) or "AWS_MAX_ATTEMPTS" in os.environ:
        return {}
    given = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {"retries": {"max_attempts": S3_ATTEMPTS}, **given}}


def count_failures(fs: Any) -> bool:
    """Have S3's client count what it makes again by itself, from now on.

    False for other storages: what their clients do, nobody can tell.
    """
    if "s3" not in fs.protocol:
        return False
    with suppress(Exception):  # what is wrong with it, the request itself says best
        fs.connect()
        # by this name a client has it once, and one that s3fs has made anew gets it too
        fs.s3.meta.events.register_first("needs-retry.s3", _answered, unique_id="tp_trainer")
    return True


def _answered(response: Any = None, caught_exception: Any = None, **_: Any) -> None:
    """One attempt of S3's client, before it decides whether to make another."""
    status = response[0].status_code if response is not None else 0
    _again[0] += caught_exception is not None or status >= 500 or status == 429
