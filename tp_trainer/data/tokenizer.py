"""The tokenizer of a run: which one, what shapes its ids, and how it begins and ends a document.

The driver imports this module (`choose_tokenizer`): transformers is imported where it is used.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tp_trainer.assets import TOKENIZER, TOKENIZER_SIZE
from tp_trainer.config import ConfigError, Data, Model, hub_file
from tp_trainer.config.quoting import assignment

WEIGHTS = (".safetensors", ".gguf", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".distcp")
NAMES = ("tokenizer", "vocab", "merges", "tekken", "spiece", "sentencepiece", "source.spm", "bpe")
HASHED = 2**26  # bytes: what is larger counts by size and time


def choose_tokenizer(data: Data, model: Model, vocab_size: int) -> tuple[str, str | None]:
    """The tokenizer's directory, hub id, `embedded` or `none` (source random), and a sentence for
    the user or None.

    What is typed wins; then the model's own; then the embedded one, where its ids fit `vocab_size`
    and no pretrained weights were trained on others. Raises ConfigError where none of them will do.
    """
    if data.source == "random":
        return "none", None
    typed = data.tokenizer
    if typed not in (None, "embedded"):
        return _typed(str(typed)), None

    if typed is None and model.name is not None:
        directory = os.path.expanduser(model.name)
        if os.path.isdir(directory):
            if _holds_tokenizer(directory):
                return os.path.abspath(directory), None
            if model.weights == "pretrained":
                raise ConfigError(
                    "data.tokenizer",
                    None,
                    f"{directory} holds no tokenizer; give data.tokenizer=<hub id or directory> "
                    "of the one that its weights were trained with, or data.tokenizer=embedded",
                )
        elif model.weights == "pretrained":
            return model.name, None
    if vocab_size < TOKENIZER_SIZE:
        raise ConfigError(
            "data.tokenizer",
            typed,
            f"the embedded tokenizer has {TOKENIZER_SIZE:,} entries, "
            f"the model's vocabulary only {vocab_size:,}; "
            "give data.tokenizer=<hub id or directory> of a smaller one, or data.source=random",
        )
    if typed == "embedded" or model.name is None:
        return "embedded", None
    return (
        "embedded",
        (
            f"data.tokenizer: {model.name} has none at hand, "
            f"so the embedded one of {TOKENIZER_SIZE:,} entries is used; "
            "give data.tokenizer=<hub id or directory> for another"
        ),
    )


def _typed(name: str) -> str:
    directory = os.path.expanduser(name)
    if os.path.isdir(directory):
        if not _holds_tokenizer(directory):
            reason = "this directory holds no tokenizer (no tokenizer.json)"
            hint = "give one that does, a hub id or embedded"
            raise ConfigError("data.tokenizer", name, f"{reason}; {hint}")
        return os.path.abspath(directory)
    if os.path.isfile(directory):
        raise ConfigError(
            "data.tokenizer",
            name,
            "is a file; give its directory: "
            + assignment("data.tokenizer", os.path.dirname(name) or "."),
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name.strip():
        raise ConfigError(
            "data.tokenizer",
            name,
            "no such directory, and not a hub id (owner/model); give one of them or embedded",
        )
    return name


def _holds_tokenizer(directory: str) -> bool:
    """Whether there is a file by its name or suffix of a tokenizer, whatever library it is of."""
    names = [path.name.lower() for path in Path(directory).iterdir() if path.is_file()]
    return any(
        name.startswith(NAMES) or name.endswith((".model", ".tiktoken", ".bpe", ".spm"))
        for name in names
    )


def load_tokenizer(name: str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The transformers tokenizer of a directory, a hub id or `embedded`. Raises ConfigError where
    it can't be loaded."""
    from transformers import AutoTokenizer

    place = TOKENIZER if name == "embedded" else name
    at = {} if revision is None else {"revision": revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **at)
    except Exception as error:  # OSError for the hub, but anything at all from a damaged directory
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConfigError(
            "data.tokenizer",
            name,
            f"can't be loaded ({reason}); give a hub id, a directory or embedded",
        ) from error
    if set(tokenizer.get_vocab().values()) <= set(
        tokenizer.all_special_ids
    ):  # transformers makes one of config.json alone
        raise ConfigError(
            "data.tokenizer", name, "holds no vocabulary; give a hub id, a directory or embedded"
        )
    return tokenizer


def tokenizer_content(name: str, trust_remote_code: bool) -> str | dict[str, object] | None:
    """What shapes the ids that a tokenizer gives: of a hub's, its commit (None: can't be told); of
    a directory's, every file that isn't weights, and with trust_remote_code the code below it."""
    directory = TOKENIZER if name == "embedded" else Path(name)
    if not directory.is_dir():
        return commit(name)
    files = {path for path in directory.iterdir() if path.is_file() and not _is_weights(path)}
    if trust_remote_code:
        files |= set(directory.rglob("*.py"))
    return {str(path.relative_to(directory)): _content(path) for path in sorted(files)}


def _is_weights(path: Path) -> bool:
    name = path.name.lower()
    return (
        name.endswith(WEIGHTS) or name.startswith("pytorch_model") or name.endswith(".index.json")
    )


def _content(path: Path) -> str:
    status = path.stat()
    if status.st_size > HASHED:
        return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def commit(name: str) -> str | None:
    """The newest commit of a hub id's tokenizer, offline the one that was kept; None where neither
    can be had."""
    for file in ("tokenizer_config.json", "tokenizer.json", "config.json"):
        try:
            path = hub_file(name, file)
        except (OSError, LookupError, ValueError):  # not there, or no network
            continue
        found = re.search(r"/snapshots/([^/]+)/", path.as_posix())
        return found[1] if found else None
    return None


def encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Documents to ids: special tokens as the tokenizer adds them, each once, and EOS at the end
    where it has one.

    A text that already begins or ends with the tokens that the tokenizer adds there (a BOS, an EOS)
    has them once.
    """

    def encode(texts: list[str], **more: bool) -> list[list[int]]:
        found: list[list[int]] = tokenizer(
            texts, return_attention_mask=False, return_token_type_ids=False, verbose=False, **more
        )["input_ids"]
        return found

    (bare,), (full,), eos = (
        encode(["a"], add_special_tokens=False),
        encode(["a"]),
        tokenizer.eos_token_id,
    )
    place = next(
        (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0
    )
    lead, tail = (full[:place], full[place + len(bare) :]) if bare else ([], [])

    def once(ids: list[int]) -> list[int]:
        if lead and ids[len(lead) : 2 * len(lead)] == lead:
            ids = ids[len(lead) :]
        if tail and ids[-2 * len(tail) : -len(tail)] == tail:
            ids = ids[: -len(tail)]
        return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]

    return lambda texts: [once(ids) for ids in encode(texts)]
