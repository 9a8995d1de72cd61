"""Local files that the datasets library reads: what it is told of one, and which is at fault.

It and pyarrow take over a second to import: they are imported where they are used.
"""

from __future__ import annotations

import csv
import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tp_trainer.config import ConfigError, Data

READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
LARGE = 2**28  # bytes of JSON, which may have to be read as a whole for its first row


def is_table(name: str | None) -> bool:
    """Whether this is one file that datasets reads."""
    return name is not None and _suffix(name) in READERS and os.path.isfile(name)


def arguments(path: str, column: str | None = None, as_text: bool = False) -> dict[str, object]:
    """load_dataset_builder's, for one file.

    Args:
        column: of parquet, the one to read; whatever is wrong with others does no harm then.
        as_text: of csv, take all columns for text, whatever their values look like.
    """
    import datasets  # type: ignore[import-untyped]

    kind = READERS[_suffix(path)]
    found: dict[str, object] = {"path": kind, "data_files": glob.escape(path)}
    if _suffix(path) == ".tsv":
        found["sep"] = "\t"
    if kind == "parquet" and column in columns_of(path):
        found["columns"] = [column]
    if kind == "csv" and as_text:
        text = datasets.Value("string")
        found["features"] = datasets.Features(dict.fromkeys(columns_of(path), text))
    return found


def reads_as_text(data: Data, error: Exception) -> bool:
    """Whether a csv file's values, and not its lines, are at fault: numbers beyond 64 bits, or
    words after numbers, in whichever column.
    """
    kinds = ("OverflowError", "ArrowInvalid", "ArrowTypeError")
    path = str(data.name)
    single = len(set(columns_of(path))) == len(columns_of(path))
    table = is_table(path) and READERS[_suffix(path)] == "csv"
    return table and single and type(_cause(error)).__name__ in kinds


def columns_of(path: str) -> list[str]:
    """The names in a file's header or schema; none where it has none, or can't be read."""
    with suppress(Exception):  # the library will say what it is
        if _suffix(path) in (".csv", ".tsv"):
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = csv.reader(file, delimiter="\t" if _suffix(path) == ".tsv" else ",")
                return next(row for row in rows if row)
        if _suffix(path) == ".parquet":
            from pyarrow import parquet

            return list(parquet.read_schema(path).names)
        if _suffix(path) == ".arrow":
            return _arrow_columns(path)
    return []


def _arrow_columns(path: str) -> list[str]:
    from pyarrow import ipc

    with open(path, "rb") as file:
        try:
            return list(ipc.open_stream(file).schema.names)
        except (OSError, ValueError):
            return list(ipc.open_file(file).schema.names)


def check_columns(data: Data) -> None:
    """Raises ConfigError where a file has no column of text, or more than one."""
    path, columns = str(data.name), columns_of(str(data.name))
    if columns and (times := columns.count(data.text_column)) != 1:
        why = (
            f"stands {times} times in {path}; rename one of them"
            if times
            else f"no such column; the file has: {', '.join(columns)} ({path})"
        )
        raise ConfigError("data.text_column", data.text_column, why)


def can_peek(path: str) -> bool:
    return _suffix(path) != ".json" or os.path.getsize(path) <= LARGE


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's own lines about a file that it can't read: there is a sentence."""
    from datasets.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def unreadable(data: Data, error: Exception) -> ConfigError:
    """A local file that datasets doesn't read, by name; in a directory it is looked for."""
    path, reason = str(data.name), _reason(error)
    if os.path.isdir(path):
        path, reason = next(_at_fault(data, path), (path, reason))
    return ConfigError("data.name", data.name, f"{path} can't be read ({reason})")


def _at_fault(data: Data, directory: str) -> Iterator[tuple[str, str]]:
    """The files below a directory that can't be read by themselves, each with the reason."""
    import datasets

    for folder, _, names in sorted(os.walk(directory)):
        for path in sorted(os.path.join(folder, name) for name in names):
            if _suffix(path) in READERS:
                try:
                    stream = datasets.load_dataset(**arguments(path), split="train", streaming=True)
                    for _ in stream:
                        pass
                except Exception as error:
                    yield path, _reason(error)


def _reason(error: BaseException) -> str:
    """One line."""
    found = _cause(error)
    empty = ("BatchSize must be greater", "corresponds to no data")
    if isinstance(found, StopIteration) or any(words in str(found) for words in empty):
        return "it holds no rows"
    text = " ".join(str(found).partition("Please either edit")[0].split())
    return text.rstrip(".") or type(found).__name__


def _cause(error: BaseException) -> BaseException:
    """Of errors that wrap one another, the outermost that says what it is."""
    inner = error.__cause__ or error.__context__
    wraps = type(error).__name__ == "DatasetGenerationError" and inner is not None
    return _cause(inner) if wraps and inner else error


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
