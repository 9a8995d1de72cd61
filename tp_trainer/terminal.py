"""The terminal that the program is shown on, which may be closed before it ends."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

_shown: list[int] = []  # the descriptors of stdout and stderr that are a terminal, or were


class _Lossy(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return memoryview(data).nbytes


def outlive() -> None:
    """From here on, what is printed to a terminal that was closed is lost, and raises nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or not stream.isatty():
            continue
        number = stream.fileno()
        buffer = io.BufferedWriter(_Lossy(number, "w", closefd=False))
        text = io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)
        setattr(sys, name, text)
        _shown.append(number)


def hung_up() -> bool:
    """Whether the terminal was closed. SIGHUP says so to the foreground's processes alone, and Ray
    gives the driver a process group of its own."""
    return any(not os.isatty(number) for number in _shown)
