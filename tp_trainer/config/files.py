"""What lies under `data.name` on the driver: kinds of files by suffix, and those that a source
reads."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tp_trainer.config.errors import ConfigError
from tp_trainer.config.quoting import assignment, pasted

SUFFIXES = {"jsonl": (".jsonl", ".ndjson"), "text": (".txt",)}
TABLES = (".json", ".csv", ".tsv", ".parquet", ".arrow")  # what the hub source's library reads
PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".tgz", ".7z")
KINDS = {"jsonl": "JSON lines", "text": "plain text", "table": "a table", "packed": "packed"}
LOOKED_AT = 10_000  # files below a directory, at most, in search of a table or of a glob to suggest
FIRST_LINE = 2**20  # bytes of a file that are tried as its first line
HUB_ID = r"[\w.-]+(/[\w.-]+)?"


def kind_of(name: str | Path) -> str | None:
    """What a file's suffix says it is: a source, `table`, `packed`, or None where it says
    nothing."""
    suffix = os.path.splitext(str(name))[1].lower()
    for source, suffixes in SUFFIXES.items():
        if suffix in suffixes:
            return source
    return "table" if suffix in TABLES else "packed" if suffix in PACKED else None


def typed(source: str) -> str:
    """What to type for a source: its group, and the key where no groups are (a saved
    config.yaml)."""
    group = {"embedded": "moby_dick"}.get(source, source)
    return "data.source=hub" if source == "hub" else f"data={group} (or data.source={source})"


@dataclass
class Listing:
    """The files that are read, sorted by path, and the names of what lies beside them and isn't."""

    files: list[Path]
    ignored: list[str]


def listed(name: str, source: str) -> Listing:
    """What a jsonl or text source reads of a file, a glob or a directory.

    A file that is reached twice (a link) is read once. Raises ConfigError where there is nothing,
    or something that can't be read.
    """
    path = os.path.expanduser(name)
    if os.path.isfile(path):
        found, ignored = [Path(path)], list[str]()
    elif os.path.isdir(path):
        found, ignored = _of_directory(name, Path(path), source)
    elif glob.has_magic(path):
        matches = sorted({Path(each) for each in glob.glob(path, recursive=True)})
        found = [each for each in matches if not each.is_dir()]
        ignored = [f"{each}/" for each in matches if each.is_dir()]
        if not found:
            inside = pasted("data.name", f"{matches[0]}/*") if ignored else ""
            raise ConfigError(
                "data.name",
                name,
                f"no file matches this glob (seen from {os.getcwd()})"
                + (f"; of the directories that do, give e.g. {inside}" if ignored else ""),
            )
    else:
        raise absent(name, f"give a file, a glob or a directory of *{SUFFIXES[source][0]}")
    return Listing(*_once(name, found, ignored))


def _of_directory(name: str, path: Path, source: str) -> tuple[list[Path], list[str]]:
    found, ignored = list[Path](), list[str]()
    for each in sorted(path.iterdir()):
        if each.is_dir():
            ignored.append(f"{each.name}/")
        elif kind_of(each) == source and not each.name.startswith("."):
            found.append(each)
        else:
            ignored.append(each.name)
    if not found:
        suffix = SUFFIXES[source][0]
        other = next((kind for kind in map(kind_of, ignored) if kind in SUFFIXES), None)
        hint = f"type {typed(other)} for its {KINDS[other]}" if other else deeper(path, source)
        hint = hint or "give a file or a glob for another suffix"
        raise ConfigError("data.name", name, f"this directory has no *{suffix} file; {hint}")
    return found, ignored


def _once(name: str, found: Iterable[Path], ignored: list[str]) -> tuple[list[Path], list[str]]:
    files: dict[object, Path] = {}
    for each in found:
        if not each.is_file():
            what = "a link to nothing" if each.is_symlink() else "neither a file nor a directory"
            raise ConfigError(
                "data.name", name, f"{each} is {what}; remove it, or give a glob without it"
            )
        if not os.access(each, os.R_OK):
            raise ConfigError("data.name", name, f"{each} can't be read (Permission denied)")
        status = each.stat()
        same = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(each)
        if (first := files.setdefault(same, each)) is not each:
            ignored.append(f"{each.name} (the same file as {first.name})")
    return list(files.values()), ignored


def absent(name: str, hint: str) -> ConfigError:
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return ConfigError(
            "data.name",
            name,
            "is neither a file nor a directory; it is read more than once, so give a regular file",
        )
    if "," in name:
        hint = "several files are one glob or one directory"
    elif re.fullmatch(HUB_ID, name):
        hint += f"; for a dataset of the hub type {typed('hub')}"
    return ConfigError(
        "data.name", name, f"no such file or directory (seen from {os.getcwd()}); {hint}"
    )


def deeper(path: Path, *sources: str) -> str | None:
    """The glob to type where a directory's files lie further down."""
    for each in below(path):
        if (source := kind_of(each)) in sources:
            those = assignment("data.name", f"{path}/**/*{SUFFIXES[str(source)][0]}")
            return f"those below it are read with {those}"
    return None


def below(path: Path) -> Iterable[Path]:
    return islice(
        (Path(folder, each) for folder, _, files in os.walk(path) for each in files), LOOKED_AT
    )


def holds_json(path: Path) -> bool:
    """Whether the first line that isn't blank is a JSON object."""
    try:
        with path.open("rb") as file:
            for line in iter(lambda: file.readline(FIRST_LINE), b""):
                if not line.isspace():
                    return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (OSError, ValueError):
        pass
    return False
