"""A dataset of the hub at one revision, or a file or directory that the datasets library reads.

datasets takes over a second to import: it is imported where it is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any

from tp_trainer.config import ConfigError, Data
from tp_trainer.config.files import absent
from tp_trainer.data.tables import (
    arguments,
    can_peek,
    check_columns,
    is_table,
    quiet,
    reads_as_text,
    unreadable,
)

COMMIT = r"[0-9a-f]{40}"


class HubData:
    """The dataset that `data` names. It is found once: what is read is what the revision says.

    Raises ConfigError, from every method, for what can't be had.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.local = os.path.isdir(data.name or "") or is_table(data.name)

    @cached_property
    def builder(self) -> Any:
        """datasets' builder of the newest revision, or of data.revision; offline, of the one that
        it has kept."""
        return self._builder()

    def _builder(self, as_text: bool = False) -> Any:
        import datasets  # type: ignore[import-untyped]

        data = self.data
        try:
            if is_table(data.name):
                told = arguments(str(data.name), data.text_column, as_text)
                return datasets.load_dataset_builder(**told)
            return datasets.load_dataset_builder(data.name, data.subset, revision=data.revision)
        except Exception as error:
            raise refused(data, error, "data.split", data.split) from error

    @property
    def revision(self) -> str | None:
        """The commit that is read; None for what is local, and where the hub can't be reached and
        nothing was kept."""
        typed = self.data.revision
        if self.local or (typed is not None and re.fullmatch(COMMIT, typed)):
            return typed
        try:
            kept = str(self.builder.hash)
        except ConfigError as error:
            if typed is None and isinstance(error.__cause__, ConnectionError):
                return None
            raise
        if typed is not None and _from_cache(self.builder):
            raise self._other(kept)
        return kept

    def _other(self, kept: str) -> ConfigError:
        return ConfigError(
            "data.revision",
            self.data.revision,
            f"can't be had without the hub; what was kept of {self.data.name} is "
            f"commit {kept}: give that, or null",
        )

    def open(self, part: str) -> tuple[int, Callable[[int, int], Iterator[tuple[str | None, str]]]]:
        """How many rows the part's split has, and their reader: texts and where they stand."""
        data = self.data
        key, split = split_of(data, part)
        if is_table(data.name):
            check_columns(data)
        builder = self.builder
        if not self.local and self.revision not in (None, builder.hash):
            raise self._other(builder.hash)

        def prepared(builder: Any) -> Any:
            builder.download_and_prepare()
            return builder.as_dataset(split=split)

        dataset = self.tried(prepared, key, split)
        check_column(data, dataset.column_names)
        place = f"{split} of {data.name}" if split != "train" else data.name
        if not is_table(data.name):
            place = split
        dataset = dataset.select_columns([data.text_column])

        def read(first: int, last: int) -> Iterator[tuple[str | None, str]]:
            for index, row in enumerate(dataset.select(range(first, last)), first):
                text = row[data.text_column]
                if text is not None and not isinstance(text, str):
                    raise _no_text(data, text, index)
                yield text, f"row {index} of {place}"

        return len(dataset), read

    def tried(self, read: Callable[[Any], Any], key: str, split: str) -> Any:
        """What `read` makes of the builder; of one that takes every column of a csv file for text,
        where the library's guesses at their kinds come to nothing."""
        with quiet():
            try:
                return read(self.builder)
            except ConfigError:
                raise
            except Exception as error:
                if reads_as_text(self.data, error):
                    with suppress(Exception):
                        return read(self._builder(as_text=True))
                raise refused(self.data, error, key, split) from error


def _no_text(data: Data, value: object, row: int) -> ConfigError:
    where = f"in row {row} of {data.name}" if is_table(data.name) else "in the dataset"
    why = f"holds a {type(value).__name__} {where}; give a column of text"
    return ConfigError("data.text_column", data.text_column, why)


def split_of(data: Data, part: str) -> tuple[str, str]:
    """The key that names a part's split, and the split."""
    if part == "validation" and data.validation_split is not None:
        return "data.validation_split", data.validation_split
    return "data.split", data.split


def _from_cache(builder: Any) -> bool:
    return type(builder).__module__.endswith("packaged_modules.cache.cache")


def peek(data: Data) -> None:
    """Of a file or a directory, on the driver: whether its splits and its column are there.

    Raises ConfigError.
    """
    table = is_table(data.name)
    if table:
        check_columns(data)
        if not can_peek(str(data.name)):
            return
    hub = HubData(data)
    for key, split in {split_of(data, part) for part in ("train", "validation")}:
        whole = re.split(r"[\[+]", split)[0]  # no slices

        def first(builder: Any, split: str = whole) -> Any:
            return next(iter(builder.as_streaming_dataset(split=split)), None)

        row = hub.tried(first, key, split)
        if table and row is None:
            raise ConfigError("data.name", data.name, "holds no rows")
        check_column(data, [data.text_column] if row is None else list(row))
        if table and row and not isinstance(row[data.text_column], str | None):
            raise _no_text(data, row[data.text_column], 0)


def check_column(data: Data, columns: list[str]) -> None:
    if data.text_column not in columns:
        raise ConfigError(
            "data.text_column",
            data.text_column,
            f"no such column; the dataset has: {', '.join(columns)}"
            + (f" ({data.name})" if is_table(data.name) else ""),
        )


def refused(data: Data, error: Exception, key: str, split: str) -> ConfigError:
    """What datasets raised, in a sentence: over a dozen kinds (not found, offline, gated, unknown
    split or subset)."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if any(
        words in reason
        for words in ("nknown split", "Bad split", "instruction format", "Requested slice")
    ):
        return ConfigError(key, split, f"{data.name} doesn't have it ({reason})")
    if "BuilderConfig" in reason or "Config name" in reason or "Couldn't find cache" in reason:
        options = " ".join(str(error).split())
        return ConfigError(
            "data.subset", data.subset, f"{data.name} needs one that it has ({options})"
        )
    if "evision" in reason and data.revision is not None:
        return ConfigError(
            "data.revision",
            data.revision,
            f"{data.name} doesn't have it ({reason}); null is the newest",
        )
    if os.path.exists(data.name or ""):
        return unreadable(data, error)
    if os.path.isabs(data.name or ""):
        return absent(str(data.name), "give a path that every node sees")
    return ConfigError(
        "data.name",
        data.name,
        f"can't be loaded ({reason}); check the id and the network, "
        "or give a local file or directory",
    )
