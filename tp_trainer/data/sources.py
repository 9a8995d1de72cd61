"""Where documents come from, and which of them are for training and which for validation.

`check_source` and `absolute` run on the driver before anything starts, so nothing heavy is imported
at the top.
"""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

from tp_trainer.assets import TEXT
from tp_trainer.config import ConfigError, Data
from tp_trainer.config.files import Listing, absent, holds_json, kind_of, listed, typed
from tp_trainer.config.source import check_kind
from tp_trainer.data.hub import HubData, peek
from tp_trainer.data.tables import is_table

Part = Literal["train", "validation"]
EMBEDDED_TRAINING_PERCENT = 90
NAMED = 3  # of what was left out, so many are named
CHECKED_FILES = 1000  # at most, whose beginning the driver reads
BEGINNING = 2**16  # bytes

Document = tuple[str | None, str]  # its text, and where it stands: a file, a line of one, a row
Reader = Callable[[int, int], Iterator[Document]]  # the documents first <= i < last


@dataclass
class Skipped:
    """The documents of a part that hold nothing: how many of them are null, empty or blank, and the
    first ones."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def note(self, text: str | None, where: str) -> None:
        self.counts["null" if text is None else "blank" if text else "empty"] += 1
        if len(self.first) < NAMED:
            self.first.append(where)


def documents(data: Data, part: Part) -> Iterator[str]:
    """The documents of one part of a source: `Source.documents`."""
    return Source(data).documents(part, Skipped())


class Source:
    """A source as it lies there: its files or its hub dataset, and the documents in them."""

    def __init__(self, data: Data) -> None:
        self.data = data

    @cached_property
    def listing(self) -> Listing:
        """The files of a jsonl or text source; of the others, none."""
        return source_files(self.data) if self.data.source in ("jsonl", "text") else Listing([], [])

    @cached_property
    def hub(self) -> HubData:
        return HubData(self.data)

    @property
    def revision(self) -> str | None:
        """The commit of a hub dataset; None where it has none or none can be told."""
        return self.hub.revision if self.data.source == "hub" else None

    def files(self) -> list[Path]:
        """All files that documents are read from; of a hub dataset that is none of ours to know,
        none."""
        if self.data.source == "embedded":
            return [TEXT]
        if self.data.source == "hub" and is_table(self.data.name):
            return [Path(str(self.data.name))]
        if self.data.source == "hub" and os.path.isdir(self.data.name or ""):
            return sorted(path for path in Path(self.data.name or "").rglob("*") if path.is_file())
        return self.listing.files

    def documents(self, part: Part, skipped: Skipped) -> Iterator[str]:
        """The documents of one part, in their source's order; those that hold nothing are noted in
        `skipped`.

        What is held out is taken off the end first and `data.percentage` is taken of the rest, so
        the validation part is the same for every percentage. Percentages count documents; of a
        source of one document, characters. Raises ConfigError for what can't be read.
        """
        for text, where in self._parts(part):
            if text and not text.isspace():
                yield text
            else:
                skipped.note(text, where)

    def _parts(self, part: Part) -> Iterator[Document]:
        data = self.data
        if data.source == "embedded":
            yield from _embedded(part, data.percentage)
            return
        own_validation = data.source == "hub" and data.validation_split is not None
        count, read = self._open(part)
        if own_validation:
            yield from read(0, count if part == "validation" else _kept(count, data.percentage))
        elif count == 1:
            text, where = next(read(0, 1))
            yield _piece(text or "", part, data), where
        elif count > 1:
            held_out = min(max(1, round(count * data.validation_percentage / 100)), count - 1)
            training = count - held_out
            yield from (
                read(training, count)
                if part == "validation"
                else read(0, _kept(training, data.percentage))
            )

    def _open(self, part: Part) -> tuple[int, Reader]:
        """How many documents there are (of that part, where it has a split of its own), and their
        reader."""
        data, files = self.data, self.listing.files
        if data.source == "hub":
            return self.hub.open(part)
        if data.source == "text":
            return len(files), lambda first, last: (
                (_read_text(data, path), str(path)) for path in files[first:last]
            )
        if data.source != "jsonl":
            raise ConfigError(
                "data.source", data.source, "has no documents; its rows are made, not read"
            )
        count = sum(1 for _ in _json_lines(data, files))

        def read(first: int, last: int) -> Iterator[Document]:
            for path, number, line in islice(_json_lines(data, files), first, last):
                yield _column(data, path, number, line), f"{path}:{number}"

        return count, read


def _embedded(part: Part, percentage: float) -> Iterator[Document]:
    text = TEXT.read_text(encoding="utf-8")
    cut = _cut(text, EMBEDDED_TRAINING_PERCENT)
    chapters = re.split(r"(?m)^(?=CHAPTER )", text[:cut] if part == "train" else text[cut:])
    chapters = [chapter for chapter in chapters if chapter]
    kept = chapters if part == "validation" else chapters[: _kept(len(chapters), percentage)]
    yield from ((chapter, f"chapter {number}") for number, chapter in enumerate(kept))


def _piece(text: str, part: Part, data: Data) -> str:
    """The training or validation part of a source that is one document."""
    cut = _cut(text, 100 - data.validation_percentage)
    if part == "validation":
        return text[cut:]
    training = text[:cut]
    return (
        training if data.percentage == 100 else training[: max(1, _cut(training, data.percentage))]
    )


def _kept(count: int, percentage: float) -> int:
    """How many of `count` documents the first `percentage` percent are: at least one, as long as
    there is one."""
    return min(count, max(1, math.floor(count * percentage / 100 + 1e-9)))


def _cut(text: str, percent: float) -> int:
    """Where to cut `text` so that about `percent` of it lies before: between paragraphs, else
    lines, else words."""
    target = int(len(text) * percent / 100)
    for separator in ("\n\n", "\n", " "):
        before, after = text.rfind(separator, 0, target), text.find(separator, target)
        cuts = [found + len(separator) for found in (before, after) if found >= 0]
        cuts = [
            cut
            for cut in cuts
            if not (text[:cut].isspace() or text[cut:].isspace()) and cut < len(text)
        ]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - target))
    return target


# -------------------------------------------------------------------------------------------- files


def source_files(data: Data) -> Listing:
    """The files of a jsonl or text source, sorted by path, and what is ignored. Raises ConfigError
    where there are none."""
    if not data.name:
        raise ConfigError(
            "data.name",
            None,
            f"is missing: data.source={data.source} needs a file, a glob or a directory",
        )
    return listed(data.name, str(data.source))


def _json_lines(data: Data, files: list[Path]) -> Iterator[tuple[Path, int, str]]:
    """Each line that isn't blank, with its file and number (from 1)."""
    for path in files:
        try:
            with path.open(encoding="utf-8-sig") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.isspace():
                        yield path, number, line
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(data, path, error) from error


def _column(data: Data, path: Path, number: int, line: str) -> str | None:
    """The text of one JSON line. Raises ConfigError naming file and line."""
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            "data.name",
            data.name,
            f"{where} is not JSON ({error}); each line must be one JSON object",
        ) from error
    if not isinstance(row, dict):
        raise ConfigError(
            "data.name",
            data.name,
            f"{where} is not a JSON object; each line must be one, "
            f'e.g. {{"{data.text_column}": ...}}',
        )
    if data.text_column not in row:
        raise ConfigError(
            "data.text_column",
            data.text_column,
            f"no such column; the file has: {', '.join(row)} ({where})",
        )
    text = row[data.text_column]
    if text is not None and not isinstance(text, str):
        raise ConfigError(
            "data.text_column",
            data.text_column,
            f"holds a {type(text).__name__} in {where}; give a column of text",
        )
    return text


def _read_text(data: Data, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(data, path, error) from error


def _unreadable(data: Data, path: Path, error: Exception) -> ConfigError:
    reason = (
        "is not UTF-8 text"
        if isinstance(error, UnicodeDecodeError)
        else f"can't be read ({getattr(error, 'strerror', error)})"
    )
    return ConfigError("data.name", data.name, f"{path} {reason}")


# --------------------------------------------------------------------------------------- the driver


def check_source(data: Data) -> None:
    """What can be known of the source in milliseconds, without the network. Raises ConfigError.

    Files must be there and be what the source reads, as far as their suffixes and beginnings tell:
    of jsonl, each first line must be JSON and have the column. Hub columns are known once it is
    loaded; a directory's, at once.
    """
    if data.source == "hub":
        name = os.path.expanduser(data.name or "")
        looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
        if os.path.isdir(name) or is_table(name):
            peek(data)
        elif kind_of(name) == "table":
            raise absent(name, "give a file, a directory or a hub id")
        elif looks_local:
            raise ConfigError(
                "data.name", data.name, "no such directory, and not a hub id (owner/dataset)"
            )
    elif data.source in ("jsonl", "text"):
        files = source_files(data).files
        for path in files:
            check_kind(str(data.name), data.source, path)
        (_check_text if data.source == "text" else _check_json)(data, files)


def _check_text(data: Data, files: list[Path]) -> None:
    if not any(path.stat().st_size for path in files):
        raise ConfigError("data.name", data.name, "holds no text; give files that aren't empty")
    for path in files[:CHECKED_FILES]:
        try:
            with path.open("rb") as file:
                beginning = file.read(BEGINNING)
            beginning.decode("utf-8-sig")
        except OSError as error:
            raise _unreadable(data, path, error) from error
        except UnicodeDecodeError as error:
            if error.start < len(beginning) - 4:  # not a character that the end cuts
                raise _unreadable(data, path, error) from error
        if b"\0" in beginning and beginning.count(b"\0") * 10 > len(beginning):
            raise ConfigError("data.name", data.name, f"{path} is not text but binary")


def _check_json(data: Data, files: list[Path]) -> None:
    found = False
    for path in files[:CHECKED_FILES]:
        if kind_of(path) == "text" and path.stat().st_size and not holds_json(path):
            raise ConfigError(
                "data.name",
                data.name,
                f"{path} is plain text, not JSON lines; type {typed('text')}",
            )
        first = next(_json_lines(data, [path]), None)
        if first is not None:
            _column(data, *first)
            found = True
    if not found and len(files) <= CHECKED_FILES:
        raise ConfigError(
            "data.name", data.name, "holds no lines; give a file with one JSON object a line"
        )


def absolute(data: Data) -> None:
    """Makes the local paths in `data` absolute, in place: workers have another working directory
    than the driver."""
    local = data.source in ("jsonl", "text") or (
        data.source == "hub" and os.path.exists(os.path.expanduser(data.name or ""))
    )
    if data.name and local:
        data.name = os.path.abspath(os.path.expanduser(data.name))
    if (
        data.tokenizer
        and data.tokenizer != "embedded"
        and os.path.isdir(os.path.expanduser(data.tokenizer))
    ):
        data.tokenizer = os.path.abspath(os.path.expanduser(data.tokenizer))
    if data.cache_dir:
        data.cache_dir = os.path.abspath(os.path.expanduser(data.cache_dir))
