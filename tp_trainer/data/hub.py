"""A dataset of the hub, or a directory that the datasets library reads, at one revision.

datasets takes over a second to import: it is imported where it is used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from tp_trainer.config import ConfigError, Data

COMMIT = r"[0-9a-f]{40}"


class HubData:
    """The dataset that `data` names. It is found once: what is read is what the revision says.

    Raises ConfigError, from every method, for what can't be had.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.local = os.path.isdir(data.name or "")

    @cached_property
    def builder(self) -> Any:
        """datasets' builder of the newest revision, or of data.revision; offline, of the one that
        it has kept."""
        import datasets  # type: ignore[import-untyped]

        data = self.data
        try:
            return datasets.load_dataset_builder(data.name, data.subset, revision=data.revision)
        except Exception as error:
            raise refused(data, error, "data.split", data.split) from error

    @property
    def revision(self) -> str | None:
        """The commit that is read; None for a directory, and where the hub can't be reached and
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
        builder = self.builder
        if not self.local and self.revision not in (None, builder.hash):
            raise self._other(builder.hash)
        try:
            builder.download_and_prepare()
            dataset = builder.as_dataset(split=split)
        except Exception as error:
            raise refused(data, error, key, split) from error
        check_column(data, dataset.column_names)
        dataset = dataset.select_columns([data.text_column])

        def read(first: int, last: int) -> Iterator[tuple[str | None, str]]:
            for index, row in enumerate(dataset.select(range(first, last)), first):
                text = row[data.text_column]
                if text is not None and not isinstance(text, str):
                    kind = type(text).__name__
                    raise ConfigError(
                        "data.text_column",
                        data.text_column,
                        f"holds a {kind} in the dataset; give a column of text",
                    )
                yield text, f"row {index} of {split}"

        return len(dataset), read


def split_of(data: Data, part: str) -> tuple[str, str]:
    """The key that names a part's split, and the split."""
    if part == "validation" and data.validation_split is not None:
        return "data.validation_split", data.validation_split
    return "data.split", data.split


def _from_cache(builder: Any) -> bool:
    return type(builder).__module__.endswith("packaged_modules.cache.cache")


def peek(data: Data) -> None:
    """Of a directory, on the driver: whether its splits and its column are there.

    Raises ConfigError.
    """
    builder = HubData(data).builder
    for key, split in {split_of(data, part) for part in ("train", "validation")}:
        try:
            stream = builder.as_streaming_dataset(split=re.split(r"[\[+]", split)[0])  # no slices
            columns = list(next(iter(stream), {data.text_column: ""}))
        except Exception as error:
            raise refused(data, error, key, split) from error
        check_column(data, columns)


def check_column(data: Data, columns: list[str]) -> None:
    if data.text_column not in columns:
        raise ConfigError(
            "data.text_column",
            data.text_column,
            f"no such column; the dataset has: {', '.join(columns)}",
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
    return ConfigError(
        "data.name",
        data.name,
        f"can't be loaded ({reason}); check the id and the network, "
        "or give a local file or directory",
    )
