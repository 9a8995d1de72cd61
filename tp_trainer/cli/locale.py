"""Text is UTF-8, whatever the locale says."""

from __future__ import annotations

import codecs
import io
import os
import sys


def leave_ascii() -> None:
    """Start this command once more in Python's UTF-8 mode where the locale is ASCII: only then do
    this process and its children (workers, tokenizers in Rust) have one name for a path. Where
    streams still can't say a character, they say its number.
    """
    ascii_paths = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if ascii_paths and os.environ.get("PYTHONUTF8") != "1":  # Python -E doesn't look there
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
