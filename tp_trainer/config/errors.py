"""What is said to the person who asked for something that can't be had."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

Stage = Literal["building", "first step", "training", "building again", "first step again"]
"""How far the workers have come; `again`: they have been started before by this command, and had
got further."""

LASTING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP}
REFUSING = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
)
"""Of a file system's errors, by number and by class, those which a second try doesn't change."""
CRASH = re.compile(
    r"gloo|nccl|cuda|cudnn|cublas|\bhip\b|connection|socket|timed? ?out|"
    r"broken pipe|\bpeer\b|rendezvous|tcpstore",
    re.IGNORECASE,
)  # what torch, NCCL, gloo and drivers say of something that has broken, by a RuntimeError
CLIENTS = {"aiohttp", "aiobotocore", "botocore", "httpcore", "httpx", "ray", "requests", "urllib3"}
"""Packages whose errors are a network's."""
MISTAKES = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    ArithmeticError,
    AssertionError,
    ImportError,
    SyntaxError,
    RuntimeError,
)


class ConfigError(ValueError):
    """Something the user asked for can't be had. `str()` of it is one line made for that person."""

    def __init__(self, key: str, value: object, message: str) -> None:
        equals = "" if value is None else f"={shown(value)}"
        super().__init__(f"{key}{equals}: {message}" if key else message)
        self.key, self.value, self.message = key, value, message

    # exceptions with several arguments don't pickle by themselves
    def __reduce__(self) -> tuple[Any, ...]:
        return (ConfigError, (self.key, self.value, self.message))


class Unrecoverable(RuntimeError):
    """The run can't go on, and a restart would come to the same. One line; every rank raises it
    alike.
    """


class OutOfMemory(Unrecoverable):
    """A device's memory didn't suffice for the first steps; with fewer fast paths it may."""


def lasting(error: BaseException) -> bool:
    """Whether files will refuse the same again: absent, forbidden, read-only, a full disk."""
    return isinstance(error, REFUSING) or (isinstance(error, OSError) and error.errno in LASTING)


def permanent(error: BaseException, stage: Stage) -> bool:
    """Whether a restart of the workers would come to the same for certain.

    What was asked for wrongly, files that refuse, and a missing package do at any time. A mistake
    of any kind does while model, data or optimizer are built, and memory that doesn't suffice up to
    the first step; unless this command has been there before and got on. A crash (a lost
    connection, a device or a collective that broke), and any other exception of a step may not.
    """
    if isinstance(error, (ConfigError, Unrecoverable)):
        return True
    chain = list(_chain(error))
    if any(
        isinstance(each, (ConnectionError, TimeoutError)) or _package(each) in CLIENTS
        for each in chain
    ):
        return False
    if lasting(error) or isinstance(error, ImportError):
        return True
    if out_of_memory(error) or isinstance(error, MemoryError):
        return stage in ("building", "first step")
    broken = isinstance(error, RuntimeError) and bool(CRASH.search(str(error)))
    distributed = type(error).__name__.startswith(
        "Dist"
    )  # torch.distributed's, of any of its backends
    return stage == "building" and isinstance(error, MISTAKES) and not broken and not distributed


def out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory didn't suffice."""
    # torch's by name: torch isn't imported here
    return isinstance(error, OutOfMemory) or type(error).__name__ == "OutOfMemoryError"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from or while handling."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def shown(value: object) -> str:
    """A value as one would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(shown, value)) + "]"
    return str(value)


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), None)
