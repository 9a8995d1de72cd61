"""What is said to the person who asked for something that can't be had."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """Something the user asked for can't be had. `str()` of it is one line made for that person."""

    def __init__(self, key: str, value: object, message: str) -> None:
        equals = "" if value is None else f"={shown(value)}"
        super().__init__(f"{key}{equals}: {message}" if key else message)
        self.key, self.value, self.message = key, value, message

    def __reduce__(self) -> tuple[Any, ...]:  # exceptions with several arguments don't pickle by themselves
        return (ConfigError, (self.key, self.value, self.message))


class Unrecoverable(RuntimeError):
    """The run can't go on, and a restart would come to the same. One line; every rank raises it alike."""


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
