"""A checkpoint's manifest: every file's size and checksum, and its own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

import xxhash

# of a file in a checkpoint: no separator, not hidden, not `..`
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MANIFEST, STATE, METADATA = "manifest.json", "state.json", "metadata.json"
VERSION = 2  # of the manifest; 1 had no checksums, and its tensors a pickled index


class Entry(NamedTuple):
    """A file as the manifest has it."""

    bytes: int
    xxh3_128: str


class Damaged(Exception):
    """A file is not what was written. The message says which one and how."""


def render(value: Mapping[str, object]) -> bytes:
    """The one way in which a value is written: any other text is not what was written."""
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def checksum(manifest: Mapping[str, object]) -> str:
    return str(xxhash.xxh3_128_hexdigest(render(manifest)))


def render_manifest(step: int, files: Mapping[str, Entry]) -> bytes:
    manifest = {
        "version": VERSION,
        "step": step,
        "files": {file: entry._asdict() for file, entry in files.items()},
    }
    return render({**manifest, "checksum": checksum(manifest)})


def parse_manifest(content: bytes, step: int) -> dict[str, Entry]:
    """The files that a manifest names. Raises Damaged."""
    try:
        values = json.loads(content)
        written = dict(values)
        if written.get("version") == 1:
            raise Damaged(f"{MANIFEST} is of an earlier version of this program, without checksums")
        stated = written.pop("checksum")
        if (
            stated != checksum(written)
            or content != render(values)
            or written["version"] != VERSION
        ):
            raise Damaged(f"{MANIFEST} is not what was written")
        if written["step"] != step:
            raise Damaged(f"{MANIFEST} is of step {written['step']}")
        files = {
            file: Entry(each["bytes"], each["xxh3_128"]) for file, each in written["files"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is not what was written") from error
    for file, entry in files.items():
        if (
            not FILE.fullmatch(file)
            or not is_count(entry.bytes)
            or not isinstance(entry.xxh3_128, str)
        ):
            raise Damaged(f"{MANIFEST} names {file[:80]!r}")
    if STATE not in files or METADATA not in files:
        raise Damaged(f"{MANIFEST} lacks {STATE} or {METADATA}")
    return files


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
