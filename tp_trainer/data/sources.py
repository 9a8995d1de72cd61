"""Where documents come from, and which of them are for training and which for validation.

`check_source` and `absolute` run on the driver before anything starts, so nothing heavy is imported at the top.
"""

import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from tp_trainer.assets import TEXT
from tp_trainer.config import ConfigError, Data

Part = Literal["train", "validation"]
EMBEDDED_TRAINING_PERCENT = 90


def documents(data: Data, part: Part) -> Iterator[str]:
    """The documents of one part, in their source's order, blank ones left out.

    What is held out is taken off the end first and `data.percentage` is taken of the rest, so the validation part is the
    same for every percentage. Percentages count documents; a source of one document is cut by position instead.
    Raises ConfigError for what can't be read.
    """
    for text in _documents(data, part):
        if text and not text.isspace():
            yield text


def _documents(data: Data, part: Part) -> Iterator[str]:
    if data.source == "embedded":
        text = TEXT.read_text(encoding="utf-8")
        cut = _cut(text, EMBEDDED_TRAINING_PERCENT)
        chapters = re.split(r"(?m)^(?=CHAPTER )", text[:cut] if part == "train" else text[cut:])
        chapters = [chapter for chapter in chapters if chapter]
        yield from chapters if part == "validation" else chapters[: _kept(len(chapters), data.percentage)]
        return
    if data.source == "random":
        raise ConfigError("data.source", data.source, "has no documents; its rows are made, not read")

    own_validation = data.source == "hub" and data.validation_split is not None
    count, read = _open(data, part)
    if own_validation:
        yield from read(0, count if part == "validation" else _kept(count, data.percentage))
    elif count == 1:
        text = next(read(0, 1))
        cut = _cut(text, 100 - data.validation_percentage)
        yield text[:cut] if part == "train" else text[cut:]
    elif count > 1:
        held_out = min(max(1, round(count * data.validation_percentage / 100)), count - 1)
        training = count - held_out
        yield from read(training, count) if part == "validation" else read(0, _kept(training, data.percentage))


def _kept(count: int, percentage: float) -> int:
    """How many of `count` documents the first `percentage` percent are: at least one, as long as there is one."""
    return min(count, max(1, math.floor(count * percentage / 100 + 1e-9)))


def _cut(text: str, percent: float) -> int:
    """Where to cut `text` so that about `percent` of it lies before: between paragraphs, else lines, else words."""
    target = int(len(text) * percent / 100)
    for separator in ("\n\n", "\n", " "):
        before, after = text.rfind(separator, 0, target), text.find(separator, target)
        cuts = [found + len(separator) for found in (before, after) if found >= 0]
        cuts = [cut for cut in cuts if not (text[:cut].isspace() or text[cut:].isspace()) and cut < len(text)]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - target))
    return target


# ----------------------------------------------------------------------------------------------------------- opening

Reader = Callable[[int, int], Iterator[str]]  # the documents first <= i < last


def _open(data: Data, part: Part) -> tuple[int, Reader]:
    """How many documents the source has (of that part, where it has validation documents of its own), and their reader."""
    if data.source == "hub":
        return _open_hub(data, part)
    files = source_files(data)
    if data.source == "text":
        return len(files), lambda first, last: (_read_text(data, path) for path in files[first:last])
    count = sum(1 for _ in _json_lines(data, files))

    def read(first: int, last: int) -> Iterator[str]:
        for number, (path, line_number, line) in enumerate(_json_lines(data, files)):
            if number >= last:
                return
            if number >= first:
                yield _column(data, path, line_number, line)

    return count, read


def _open_hub(data: Data, part: Part) -> tuple[int, Reader]:
    import datasets  # type: ignore[import-untyped]  # here, since it takes over a second

    key, split = "data.split", data.split
    if part == "validation" and data.validation_split is not None:
        key, split = "data.validation_split", data.validation_split
    try:
        dataset = datasets.load_dataset(data.name, data.subset, split=split)
    except Exception as error:  # datasets raises over a dozen kinds here: not found, offline, gated, unknown split or subset
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if any(words in reason for words in ("nknown split", "Bad split", "instruction format", "Requested slice")):
            raise ConfigError(key, split, f"{data.name} doesn't have it ({reason})") from error
        if "BuilderConfig" in reason or "Config name" in reason:
            options = " ".join(str(error).split())
            raise ConfigError("data.subset", data.subset, f"{data.name} needs one that it has ({options})") from error
        raise ConfigError(
            "data.name", data.name, f"can't be loaded ({reason}); check the id and the network, or give data.source=jsonl with local files"
        ) from error
    columns = dataset.column_names
    if data.text_column not in columns:
        raise ConfigError("data.text_column", data.text_column, f"no such column; the dataset has: {', '.join(columns)}")
    dataset = dataset.select_columns([data.text_column])

    def read(first: int, last: int) -> Iterator[str]:
        for row in dataset.select(range(first, last)):
            yield _as_text(data, row[data.text_column], "the dataset")

    return len(dataset), read


def source_files(data: Data) -> list[Path]:
    """The files of a jsonl or text source, sorted by path. Raises ConfigError where there are none."""
    name, suffix = os.path.expanduser(data.name or ""), {"jsonl": "jsonl", "text": "txt"}[data.source]
    path = Path(name)
    if not name:
        raise ConfigError("data.name", None, f"is missing: data.source={data.source} needs a file, a glob or a directory")
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(each for each in path.glob(f"*.{suffix}") if each.is_file())
        if not found:
            raise ConfigError("data.name", data.name, f"this directory has no *.{suffix} file; give a file or a glob for another suffix")
        return found
    if glob.has_magic(name):
        found = sorted(Path(each) for each in glob.glob(name, recursive=True) if os.path.isfile(each))
        if not found:
            raise ConfigError("data.name", data.name, f"no file matches this glob (seen from {os.getcwd()})")
        return found
    raise ConfigError(
        "data.name", data.name, f"no such file or directory (seen from {os.getcwd()}); give a file, a glob or a directory of *.{suffix}"
    )


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


def _column(data: Data, path: Path, number: int, line: str) -> str:
    """The text of one JSON line. Raises ConfigError naming file and line."""
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError("data.name", data.name, f"{where} is not JSON ({error}); each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise ConfigError(
            "data.name", data.name, f'{where} is not a JSON object; each line must be one, e.g. {{"{data.text_column}": ...}}'
        )
    if data.text_column not in row:
        raise ConfigError("data.text_column", data.text_column, f"no such column; the file has: {', '.join(row)} ({where})")
    return _as_text(data, row[data.text_column], where)


def _as_text(data: Data, value: Any, where: str) -> str:
    if value is None:
        return ""  # a missing text is a blank document
    if not isinstance(value, str):
        raise ConfigError("data.text_column", data.text_column, f"holds a {type(value).__name__} in {where}; give a column of text")
    return value


def _read_text(data: Data, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(data, path, error) from error


def _unreadable(data: Data, path: Path, error: Exception) -> ConfigError:
    reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"can't be read ({getattr(error, 'strerror', error)})"
    return ConfigError("data.name", data.name, f"{path} {reason}")


# -------------------------------------------------------------------------------------------------------- the driver


def check_source(data: Data) -> None:
    """What can be known of the source in milliseconds, without the network. Raises ConfigError.

    Files must be there; of jsonl, the first line must be JSON and have the column. Hub columns are known once it is loaded.
    """
    if data.source == "hub":
        name = data.name or ""
        looks_local = name.startswith(("/", ".", "~")) or name.count("/") > 1
        if looks_local and not os.path.isdir(os.path.expanduser(name)):
            raise ConfigError("data.name", data.name, "no such directory, and not a hub id (owner/dataset)")
    elif data.source in ("jsonl", "text"):
        files = source_files(data)
        if data.source == "text":
            if not any(path.stat().st_size for path in files):
                raise ConfigError("data.name", data.name, "holds no text; give files that aren't empty")
            return
        first = next(_json_lines(data, files), None)
        if first is None:
            raise ConfigError("data.name", data.name, "holds no lines; give a file with one JSON object a line")
        _column(data, *first)


def absolute(data: Data) -> None:
    """Makes the local paths in `data` absolute, in place: workers have another working directory than the driver."""
    local = data.source in ("jsonl", "text") or (data.source == "hub" and os.path.isdir(os.path.expanduser(data.name or "")))
    if data.name and local:
        data.name = os.path.abspath(os.path.expanduser(data.name))
    if data.tokenizer and data.tokenizer != "embedded" and os.path.isdir(os.path.expanduser(data.tokenizer)):
        data.tokenizer = os.path.abspath(os.path.expanduser(data.tokenizer))
    if data.cache_dir:
        data.cache_dir = os.path.abspath(os.path.expanduser(data.cache_dir))
