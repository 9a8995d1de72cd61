"""Which source follows from `data.name`, and what contradicts one that was typed.

`source_of` looks at the driver's files, `check_data` at the words alone.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
from pathlib import Path

from tp_trainer.config.errors import ConfigError, shown
from tp_trainer.config.files import (
    HUB_ID,
    SUFFIXES,
    absent,
    below,
    deeper,
    holds_json,
    kind_of,
    listed,
    typed,
)
from tp_trainer.config.quoting import assignment
from tp_trainer.config.schema import SOURCES, Data

SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # of datasets' save_to_disk

_READ = {  # of the keys that not every source reads
    "embedded": {"percentage", "tokenizer"},
    "text": {"percentage", "tokenizer", "validation_percentage"},
    "jsonl": {"percentage", "tokenizer", "validation_percentage", "text_column"},
    "hub": {
        "percentage",
        "tokenizer",
        "validation_percentage",
        "text_column",
        "subset",
        "split",
        "validation_split",
        "revision",
    },
    "random": set[str](),
}
_ALWAYS = {"source", "name", "seq_length", "shuffle", "cache_dir"}


# -------------------------------------------------------------------------- the source that follows


def source_of(name: str | None) -> str:
    """The source that follows from `data.name` alone. Raises ConfigError where nothing or too much
    does."""
    if name is None:
        return "embedded"
    _check_words(name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return _source_of_directory(name, Path(path))
    if os.path.isfile(path) and kind_of(path) == "table":
        return "hub"
    if os.path.isfile(path) or glob.has_magic(path):
        return _source_of_files(name, listed(name, "jsonl").files)
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1 or kind_of(name) is not None
    if local or os.path.exists(path) or os.path.isdir(os.path.dirname(path)) or "," in name:
        raise absent(name, "give a file, a glob, a directory or a hub id")
    if not re.fullmatch(HUB_ID, name):
        raise ConfigError(
            "data.name", name, "no such file or directory, and not a hub id (owner/dataset)"
        )
    return "hub"


def _source_of_directory(name: str, path: Path) -> str:
    if any((path / each).is_file() for each in SAVED):
        return "hub"
    kinds = [
        kind_of(each) for each in path.iterdir() if each.is_file() and not each.name.startswith(".")
    ]
    both = [
        f"{kinds.count(source)} *{SUFFIXES[source][0]}" for source in SUFFIXES if source in kinds
    ]
    if len(both) > 1:
        raise ConfigError(
            "data.name",
            name,
            f"this directory holds {' and '.join(both)} files; type {typed('jsonl')} "
            f"or {typed('text')} for the ones or the others",
        )
    for source in SUFFIXES:
        if source in kinds:
            return _source_of_files(name, listed(name, source).files)
    if "table" in kinds or any(kind_of(each) == "table" for each in below(path)):
        return "hub"
    hint = (
        deeper(path, *SUFFIXES)
        or "for files of another suffix give a glob and data=text or data=jsonl"
    )
    raise ConfigError(
        "data.name", name, f"this directory has no *.jsonl, no *.txt and no saved dataset; {hint}"
    )


def _source_of_files(name: str, files: list[Path]) -> str:
    kinds = {kind_of(each): each for each in reversed(files)}
    if len(kinds) > 1:
        examples = ", ".join(str(each) for each in list(kinds.values())[:3])
        raise ConfigError(
            "data.name",
            name,
            f"these are files of different kinds ({examples}); give a glob of one, "
            "or say what all of them are: data=text or data=jsonl",
        )
    ((kind, first),) = kinds.items()
    if kind not in SUFFIXES:
        raise ConfigError("data.name", name, _unfit(first))
    if kind == "text" and holds_json(first):
        raise ConfigError(
            "data.name",
            name,
            f"{first} holds JSON lines, whatever its suffix says; type {typed('jsonl')}, "
            f"or {typed('text')} to train on it as it stands",
        )
    return str(kind)


def _unfit(path: Path | str) -> str:
    """What to type for a file whose suffix is that of no source."""
    kind = kind_of(path)
    if kind == "packed":
        return f"{path} is packed; unpack it"
    if kind == "table":
        alone = assignment("data.name", path)
        folder = assignment("data.name", os.path.dirname(str(path)) or ".")
        return (
            f"{path} is neither JSON lines nor plain text; by itself it is read with "
            f"data.source=hub {alone}, its directory with data.source=hub {folder} "
            "data.text_column=<column>"
        )
    return f"the suffix of {path} doesn't say what it is; type {typed('text')} or {typed('jsonl')}"


# ------------------------------------------------------------------------------ what contradicts it


def check_data(data: Data) -> None:
    """The rules over `data` that its words tell. Raises ConfigError for a name that the source
    wouldn't read, would read as what it isn't, and for keys that it doesn't read."""
    source, name = str(data.source), data.name
    if source in ("embedded", "random"):
        if name is not None:
            raise ConfigError(
                "data.name",
                name,
                f"data.source={source} reads no file and no dataset; {_right(name)}",
            )
    elif not name:
        wanted = "a hub id" if source == "hub" else "a file, a glob or a directory"
        raise ConfigError("data.name", None, f"is missing: data.source={source} needs {wanted}")
    else:
        _check_words(name)
        if source == "hub":
            _check_hub(data, name)
        elif not os.path.isdir(os.path.expanduser(name)):
            check_kind(name, source, name)
    _check_unread(data, source)


def check_kind(name: str, source: str, path: str | Path) -> None:
    """Raises ConfigError where a file's suffix says that it is not what the jsonl or text source
    reads.

    JSON lines under another suffix are the user's word for it (`check_source` reads the first
    line).
    """
    kind = kind_of(path)
    if source == "text" and kind == "jsonl":
        raise ConfigError(
            "data.name", name, f"{path} is JSON lines, not plain text; type {typed('jsonl')}"
        )
    odd = kind == "packed" or (
        kind == "table" and (source == "text" or not str(path).lower().endswith(".json"))
    )
    if odd:
        raise ConfigError("data.name", name, _unfit(path))


def _right(name: str) -> str:
    """What to type for a name that another source should read."""
    kind = kind_of(name)
    if kind not in SUFFIXES:
        try:
            kind = source_of(name)
        except ConfigError as error:
            return error.message
    return f"type {typed(str(kind))}"


def _check_words(name: str) -> None:
    if not name.strip():
        raise ConfigError(
            "data.name", name, "is empty; give a file, a glob, a directory or a hub id, or null"
        )
    path = os.path.expanduser(name)
    if "://" in name:
        found = re.fullmatch(rf"(?:hf://datasets/|https?://[^/]+/datasets/)({HUB_ID})/?", name)
        hint = (
            f"type data.name={found[1]}"
            if found
            else "copy it to a disk that all nodes see and give its path"
        )
        raise ConfigError("data.name", name, f"URLs aren't read; {hint}")
    if name in SOURCES and not os.path.exists(path):
        raise ConfigError(
            "data.name", name, f"is a source, not a name; type {typed(name)} without data.name"
        )
    found = re.fullmatch(rf"({HUB_ID})([@:])(\S+)", name)
    if found and not os.path.exists(path):
        key = "revision" if found[3] == "@" else "subset"
        part = assignment(f"data.{key}", found[4])
        raise ConfigError("data.name", name, f"type data.name={found[1]} {part}")


def _check_hub(data: Data, name: str) -> None:
    path = os.path.expanduser(name)
    kind, table = kind_of(name), os.path.isfile(path) and kind_of(name) == "table"
    if not table and (os.path.isfile(path) or (kind in SUFFIXES and not os.path.isdir(path))):
        hint = f"type {typed(kind)}" if kind in SUFFIXES else _unfit(name)
        raise ConfigError(
            "data.name", name, f"is a file, and data.source=hub reads datasets of the hub; {hint}"
        )
    if glob.has_magic(name) and not (table or os.path.isdir(path)):
        raise ConfigError(
            "data.name",
            name,
            f"is a glob, and data.source=hub reads datasets of the hub; {_right(name)}",
        )
    what = "a file" if table else "a directory"
    if (table or os.path.isdir(path)) and data.revision is not None:
        raise ConfigError(
            "data.revision", data.revision, f"{name} is {what} and has none; leave it null"
        )
    if table and data.subset is not None:
        raise ConfigError(
            "data.subset", data.subset, f"{name} is a file and has none; leave it null"
        )
    default = next(
        each.default for each in dataclasses.fields(Data) if each.name == "validation_percentage"
    )
    if data.validation_split is not None and data.validation_percentage != default:
        raise ConfigError(
            "data.validation_percentage",
            data.validation_percentage,
            f"is not read beside data.validation_split={data.validation_split}; "
            "give data.validation_split=null to hold out so many percent",
        )


def _check_unread(data: Data, source: str) -> None:
    for each in dataclasses.fields(Data):
        value = getattr(data, each.name)
        if each.name not in _ALWAYS | _READ[source] and value != each.default:
            default = "null" if each.default is None else shown(each.default)
            why = (
                " (its text is cut 90/10)"
                if (source, each.name) == ("embedded", "validation_percentage")
                else ""
            )
            raise ConfigError(
                f"data.{each.name}",
                value,
                f"data.source={source} doesn't read it{why}; "
                f"leave it out, or give data.{each.name}={default}",
            )
