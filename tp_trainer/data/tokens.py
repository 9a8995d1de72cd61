"""Documents become one file of token ids, made once and memory-mapped; a row is `seq_length` of them and the next ones.

The driver imports this module too (`choose_tokenizer`): torch and transformers are imported where they are used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tp_trainer.assets import TEXT, TOKENIZER, TOKENIZER_SIZE
from tp_trainer.config import ConfigError, Data, Model, cache_dir
from tp_trainer.data.sources import Part, documents, source_files

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100  # the label that doesn't count, torch's own
FORMAT = 1  # of the token files; part of their fingerprint
BATCH_CHARACTERS = 1_000_000  # enough text at a time for the fast tokenizers' threads, little enough for memory
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


# --------------------------------------------------------------------------------------------------------- tokenizer


def choose_tokenizer(data: Data, model: Model, vocab_size: int) -> tuple[str, str | None]:
    """The tokenizer's directory, hub id, `embedded` or `none` (source random), and a sentence for the user or None.

    What is typed wins; then the model's own, where it is at hand; then the embedded one, where its ids fit `vocab_size`.
    Raises ConfigError where none of them will do.
    """
    if data.source == "random":
        return "none", None
    typed = data.tokenizer
    if typed not in (None, "embedded"):
        assert typed is not None
        directory = os.path.expanduser(typed)
        if os.path.isdir(directory):
            if not _holds_tokenizer(directory):
                raise ConfigError(
                    "data.tokenizer",
                    typed,
                    "this directory holds no tokenizer (no tokenizer.json); give one that does, a hub id or embedded",
                )
            return os.path.abspath(directory), None
        if typed.startswith(("/", ".", "~")) or typed.count("/") > 1:
            raise ConfigError("data.tokenizer", typed, "no such directory, and not a hub id (owner/model); give one of them or embedded")
        return typed, None

    if typed is None and model.name is not None:
        directory = os.path.expanduser(model.name)
        if os.path.isdir(directory):
            if _holds_tokenizer(directory):
                return os.path.abspath(directory), None
        elif model.weights == "pretrained":
            return model.name, None
    if vocab_size < TOKENIZER_SIZE:
        raise ConfigError(
            "data.tokenizer", typed,
            f"the embedded tokenizer has {TOKENIZER_SIZE:,} entries, the model's vocabulary only {vocab_size:,}; "
            "give data.tokenizer=<hub id or directory> of a smaller one, or data.source=random",
        )  # fmt: skip
    if typed == "embedded" or model.name is None:
        return "embedded", None
    return "embedded", (
        f"data.tokenizer: {model.name} has none at hand, so the embedded one of {TOKENIZER_SIZE:,} entries is used; "
        "give data.tokenizer=<hub id or directory> for another"
    )


def _holds_tokenizer(directory: str) -> bool:
    return any(os.path.isfile(os.path.join(directory, name)) for name in TOKENIZER_FILES)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer of a directory, a hub id or `embedded`. Raises ConfigError where it can't be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(TOKENIZER if name == "embedded" else name, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError for the hub, but anything at all from a damaged directory
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError("data.tokenizer", name, f"can't be loaded ({reason}); give a hub id, a directory or embedded") from error


# ------------------------------------------------------------------------------------------------------- token files


def prepare(data: Data, tokenizer_name: str, vocab_size: int, part: Part, trust_remote_code: bool = False) -> Path:
    """The directory with the tokens of one part, made if it isn't there yet.

    It holds tokens.bin (uint16 or uint32), counts.npy (int64, how often each id occurs) and meta.json. Each document is what
    the tokenizer makes of it, special tokens included, and ends with EOS where the tokenizer has one. The directory appears
    whole or not at all; of two processes that make it at once, the first one's stays.

    Raises:
        ConfigError: no documents, a token id that the model's `vocab_size` doesn't have, what `documents` raises.
    """
    fingerprint = _fingerprint(data, tokenizer_name, part)
    directory = cache_dir(data) / fingerprint
    if not _complete(directory):
        scratch = directory.with_name(f".{fingerprint}.{uuid.uuid4().hex}")
        try:
            scratch.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(
                "data.cache_dir", data.cache_dir, f"can't write to {directory.parent} ({error.strerror}); give another one"
            ) from error
        try:
            _tokenise(data, tokenizer_name, part, trust_remote_code, scratch, fingerprint)
            _publish(scratch, directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    largest = json.loads((directory / "meta.json").read_text())["largest_id"]
    if largest >= vocab_size:  # on every call: the file may have been made for a model with more entries
        raise ConfigError(
            "data.tokenizer", tokenizer_name,
            f"gives token id {largest:,}, the model's vocabulary has only {vocab_size:,}; give the model's own tokenizer or embedded",
        )  # fmt: skip
    return directory


def _tokenise(data: Data, tokenizer_name: str, part: Part, trust_remote_code: bool, directory: Path, fingerprint: str) -> None:
    tokenizer = load_tokenizer(tokenizer_name, trust_remote_code)
    eos = tokenizer.eos_token_id
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)
    counts = np.zeros(0, np.int64)
    number = 0
    with (directory / "tokens.bin").open("wb") as out:
        for texts in _batches(documents(data, part)):
            number += len(texts)
            encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]
            if eos is not None:
                encoded = [ids if ids and ids[-1] == eos else [*ids, eos] for ids in encoded]
            ids = np.fromiter(chain.from_iterable(encoded), np.int64)
            counts = _add(counts, np.bincount(ids))
            ids.astype(dtype).tofile(out)
    tokens = int(counts.sum())
    if tokens == 0:
        raise ConfigError("data.name", data.name, f"the {part} part has no text; check data.name, data.split and data.text_column")
    np.save(directory / "counts.npy", counts)
    meta = {
        "tokens": tokens, "documents": number, "dtype": dtype.name, "eos_id": eos, "largest_id": len(counts) - 1,
        "part": part, "tokenizer": tokenizer_name, "fingerprint": fingerprint,
    }  # fmt: skip
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


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
        meta = json.loads((directory / "meta.json").read_text())
        return (directory / "tokens.bin").stat().st_size == meta["tokens"] * np.dtype(meta["dtype"]).itemsize
    except (OSError, ValueError, KeyError):
        return False


def _publish(scratch: Path, directory: Path) -> None:
    """Renames `scratch` to `directory`, unless a whole one came first; one that is damaged is replaced."""
    for _ in range(2):
        try:
            os.rename(scratch, directory)  # a directory is never renamed over one that has files
            return
        except OSError:
            if _complete(directory):
                return
            shutil.rmtree(directory, ignore_errors=True)
    os.rename(scratch, directory)


def _fingerprint(data: Data, tokenizer_name: str, part: Part) -> str:
    """A name for all that shapes the tokens. Local files count by path, size and time, hub datasets by id."""
    facts = {
        "format": FORMAT, "part": part, "source": data.source, "name": data.name, "subset": data.subset,
        "splits": [data.split, data.validation_split], "column": data.text_column,
        "percentages": [float(data.percentage), float(data.validation_percentage)], "tokenizer": _tokenizer_content(tokenizer_name),
    }  # fmt: skip
    files: list[Path] = []
    if data.source == "embedded":
        facts["text"] = _sha256(TEXT)
    elif data.source in ("jsonl", "text"):
        files = source_files(data)
    elif data.source == "hub" and data.name and os.path.isdir(data.name):
        files = sorted(path for path in Path(data.name).rglob("*") if path.is_file())
    facts["files"] = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_content(name: str) -> Any:
    directory = TOKENIZER if name == "embedded" else Path(name)
    if not directory.is_dir():
        return name
    files = [directory / each for each in (*TOKENIZER_FILES, "merges.txt", "special_tokens_map.json", "added_tokens.json")]
    return {path.name: _sha256(path) for path in files if path.is_file()}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- rows


class Rows:
    """Rows over a directory of `prepare`. Row i is tokens[i*S : i*S+S], its labels the ones after: every label counts.

    Documents follow one another without padding; what is left at the end is less than a row and isn't used.
    """

    def __init__(self, directory: str | Path, seq_length: int) -> None:
        self.directory, self.seq_length = Path(directory), seq_length
        self.meta: dict[str, Any] = json.loads((self.directory / "meta.json").read_text())
        self.tokens = np.memmap(self.directory / "tokens.bin", dtype=self.meta["dtype"], mode="r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_length

    def __getitem__(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1]: the row and the token after it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * self.seq_length
        return self.tokens[start : start + self.seq_length + 1].astype(np.int64)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """input_ids and labels, int64 [len(indices), seq_length]; index -1 is a row of zeros whose labels don't count."""
        return _batch(self, indices)

    @property
    def counts(self) -> np.ndarray:
        """int64 [ids]: how often each id occurs in all tokens."""
        return np.load(self.directory / "counts.npy")

    @property
    def identity(self) -> str:
        """A digest of the tokens: of how often each occurs, and of a thousand pieces of the text in their order."""
        places = np.linspace(0, max(0, len(self.tokens) - 64), 1000, dtype=np.int64)
        pieces = self.tokens[(places[:, None] + np.arange(64)).clip(max=len(self.tokens) - 1)]
        return hashlib.sha256(self.counts.tobytes() + pieces.astype(np.int64).tobytes()).hexdigest()[:32]


class RandomRows:
    """Rows of uniformly random tokens: row i is a function of (seed, i)."""

    identity = "random"

    def __init__(self, vocab_size: int, seq_length: int, seed: int, rows: int = 1_000_000) -> None:
        self.vocab_size, self.seq_length, self.seed, self.rows = vocab_size, seq_length, seed, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1]: the row and the token after it."""
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, index])))
        return generator.integers(self.vocab_size, size=self.seq_length + 1)

    def batch(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """As `Rows.batch`."""
        return _batch(self, indices)


def _batch(rows: Rows | RandomRows, indices: Sequence[int]) -> dict[str, torch.Tensor]:
    import torch

    inputs = np.zeros((len(indices), rows.seq_length), np.int64)
    labels = np.full((len(indices), rows.seq_length), IGNORE_INDEX, np.int64)
    for place, index in enumerate(indices):
        if index != -1:
            window = rows[int(index)]
            inputs[place], labels[place] = window[:-1], window[1:]
    return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}


# ---------------------------------------------------------------------------------------------------------- baseline


def unigram_loss(train_tokens: np.ndarray, validation_tokens: np.ndarray, vocab_size: int) -> float:
    """The loss of a model that knows only how frequent each token is, in nats per token.

    Mean negative log-likelihood of the validation tokens under (count + 1) / (tokens + vocab_size), counted in training.
    """
    return unigram_loss_of_counts(np.bincount(train_tokens), np.bincount(validation_tokens), vocab_size)


def unigram_loss_of_counts(train: np.ndarray, validation: np.ndarray, vocab_size: int) -> float:
    """`unigram_loss` from how often each id occurs, int64 [ids]."""
    train, validation = _add(train, np.zeros(vocab_size, np.int64)), _add(validation, np.zeros(vocab_size, np.int64))
    log_likelihood = np.log((train + 1) / (train.sum() + vocab_size))
    return float(-(validation * log_likelihood).sum() / validation.sum())


def _add(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two counts of different lengths."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    total = longer.astype(np.int64)
    total[: len(shorter)] += shorter
    return total
