"""Documents become one file of token ids, made once; rows.py maps it into memory.

The driver imports this module too: torch is imported where it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from tp_trainer.assets import TEXT
from tp_trainer.config import ConfigError, Data, cache_dir
from tp_trainer.data.rows import add_counts
from tp_trainer.data.sources import Part, Skipped, Source
from tp_trainer.data.tokenizer import encoder, load_tokenizer, tokenizer_content

FORMAT = 2  # of the token files; part of their fingerprint
# enough text at a time for the fast tokenizers' threads, little enough for memory
BATCH_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class _Facts:
    """All that shapes the tokens of a part, as meta.json has it. What can't be told, as a hub's
    commit without a network, is None."""

    format: int
    part: Part
    source: str | None
    name: str | None
    subset: str | None
    revision: str | None
    splits: list[str | None]  # of training and validation
    column: str
    percentages: list[float]  # of training and validation
    files: list[list[str | int]]
    tokenizer: str
    tokenizer_content: str | dict[str, object] | None
    trust_remote_code: bool

    @property
    def fingerprint(self) -> str:
        """The name of the token file that these facts make."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]

    @property
    def is_hub(self) -> bool:
        return self.source == "hub" and not os.path.exists(self.name or "")


def prepare(
    data: Data,
    tokenizer_name: str,
    vocab_size: int,
    part: Part,
    trust_remote_code: bool = False,
    source: Source | None = None,
) -> Path:
    """The directory with the tokens of one part, made if it isn't there yet.

    It holds tokens.bin (uint16 or uint32), counts.npy (int64, how often each id occurs) and
    meta.json (what was found). Each document is what the tokenizer makes of it, special tokens
    included, and ends with EOS where the tokenizer has one. The directory appears whole or not at
    all; of two processes that make it at once, the first one's stays.

    Raises:
        ConfigError: no documents, a token id that the model's `vocab_size` doesn't have, what
        `Source` raises.
    """
    source = source or Source(data)
    facts = _facts(source, tokenizer_name, part, trust_remote_code)
    directory = _made_before(cache_dir(data), facts) or cache_dir(data) / facts.fingerprint
    if not _complete(directory):
        scratch = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(
                "data.cache_dir",
                data.cache_dir,
                f"can't write to {directory.parent} ({error.strerror}); give another one",
            ) from error
        try:
            _tokenise(source, facts, trust_remote_code, scratch)
            if _files(source) != facts.files:
                raise ConfigError(
                    "data.name",
                    data.name,
                    "was changed while it was read; start again once it stands",
                )
            _publish(scratch, directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    largest = json.loads((directory / "meta.json").read_text(encoding="utf-8"))["largest_id"]
    if (
        largest >= vocab_size
    ):  # on every call: the file may have been made for a model with more entries
        raise ConfigError(
            "data.tokenizer",
            tokenizer_name,
            f"gives token id {largest:,}, the model's vocabulary has only {vocab_size:,}; "
            "give the model's own tokenizer or embedded",
        )
    return directory


def _tokenise(source: Source, facts: _Facts, trust_remote_code: bool, directory: Path) -> None:
    data, part, name = source.data, facts.part, facts.tokenizer
    of_hub = facts.tokenizer_content if isinstance(facts.tokenizer_content, str) else None
    tokenizer = load_tokenizer(name, trust_remote_code, of_hub)
    encode, skipped = encoder(tokenizer), Skipped()
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    counts = np.zeros(0, np.int64)
    number = 0
    with (directory / "tokens.bin").open("wb") as out:
        for texts in _batches(source.documents(part, skipped)):
            number += len(texts)
            ids = np.fromiter(chain.from_iterable(encode(texts)), np.int64)
            counts = add_counts(counts, np.bincount(ids))
            ids.astype(dtype).tofile(out)
    tokens = int(counts.sum())
    if tokens == 0:
        raise ConfigError(
            "data.name",
            data.name,
            f"the {part} part has no text; check data.name, data.split and data.text_column"
            + _told(skipped),
        )
    np.save(directory / "counts.npy", counts)
    meta = {
        "tokens": tokens,
        "documents": number,
        "documents_skipped": skipped.counts.total(),
        "skipped": dict(skipped.counts),
        "first_skipped": skipped.first,
        "dtype": dtype.name,
        "eos_id": tokenizer.eos_token_id,
        "largest_id": len(counts) - 1,
        "part": part,
        "tokenizer": name,
        "revision": facts.revision,
        "fingerprint": facts.fingerprint,
        "facts": asdict(facts),
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _told(skipped: Skipped) -> str:
    number = skipped.counts.total()
    return (
        f" ({number:,} of its documents are null, empty or blank: {', '.join(skipped.first)})"
        if number
        else ""
    )


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _complete(directory: Path) -> bool:
    """Whether the directory holds as many tokens as it says."""
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        return (directory / "tokens.bin").stat().st_size == meta["tokens"] * np.dtype(
            meta["dtype"]
        ).itemsize
    except (OSError, ValueError, KeyError):
        return False


def _publish(scratch: Path, directory: Path) -> None:
    """Renames `scratch` to `directory`, unless a whole one came first; one that is damaged is
    replaced."""
    for _ in range(2):
        try:
            os.rename(scratch, directory)  # a directory is never renamed over one that has files
            return
        except OSError:
            if _complete(directory):
                return
            shutil.rmtree(directory, ignore_errors=True)
    os.rename(scratch, directory)


def _facts(source: Source, tokenizer_name: str, part: Part, trust_remote_code: bool) -> _Facts:
    data = source.data
    return _Facts(
        format=FORMAT,
        part=part,
        source=data.source,
        name=data.name,
        subset=data.subset,
        revision=source.revision,
        splits=[data.split, data.validation_split],
        column=data.text_column,
        percentages=[float(data.percentage), float(data.validation_percentage)],
        files=_files(source),
        tokenizer=tokenizer_name,
        tokenizer_content=tokenizer_content(tokenizer_name, trust_remote_code),
        trust_remote_code=trust_remote_code,
    )


def _files(source: Source) -> list[list[str | int]]:
    """Local files by path, size and times: ctime too, which nobody sets, so that a copy that kept
    size and mtime shows."""
    if source.data.source == "embedded":
        return [["embedded", hashlib.sha256(TEXT.read_bytes()).hexdigest()]]
    stats = [(path, path.stat()) for path in source.files()]
    return [[str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats]


def _made_before(cache: Path, facts: _Facts) -> Path | None:
    """Where the hub can't say which commit is the newest: the newest token file of any, everything
    else alike."""
    unknown = {key for key in ("tokenizer_content", "revision") if getattr(facts, key) is None}
    if not (unknown and ("tokenizer_content" in unknown or facts.is_hub)):
        return None
    made = []
    for path in cache.glob("*/meta.json"):
        try:
            theirs = json.loads(path.read_text(encoding="utf-8")).get("facts") or {}
        except (OSError, ValueError):
            continue
        if _complete(path.parent) and all(
            theirs.get(key) == value for key, value in asdict(facts).items() if key not in unknown
        ):
            made.append(path)
    return max(made, key=lambda path: path.stat().st_mtime).parent if made else None
