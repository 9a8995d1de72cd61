"""Which files hold a model's weights, resolved as transformers' from_pretrained does, and what is
in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tp_trainer.config import ConfigError, Model, hub_file
from tp_trainer.config.architecture import (
    ADAPTER,
    ADAPTER_REFUSED,
    FROM_FILE,
    no_safetensors,
)
from tp_trainer.models.families import Family

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXPLICIT = "transformers_weights"  # the config field that names another file
FLOATS = ("F64", "F32", "F16", "BF16")
LFS = b"version https://git-lfs"
RANDOM = "model.weights=random needs none"
TOWER = re.compile(r"(^|\.)language_model\.")  # in a multimodal model's names


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors has it, e.g. BF16


def stored_tensors(model: Model) -> dict[str, Stored]:
    """The tensors of a model's own weight files, by the names they have there; of a multimodal
    model, its text part's, by the names that these have in a text model.

    Raises:
        ConfigError: no safetensors, a shard that is absent, a file that is none, quantised weights.
    """
    check_quantisation(model)
    name = str(model.name)
    found: dict[str, Stored] = {}
    for file in weight_files(model):
        # of a tensor in several shards the last counts, as in transformers
        found.update(_header(file, name))
    found = _text_part(found, isinstance(model.architecture.get(FROM_FILE), str))
    if wrong := sorted(each.name for each in found.values() if each.dtype not in FLOATS):
        raise ConfigError(
            "model.name",
            name,
            f"{wrong[0]} is of dtype {found[wrong[0]].dtype}; only {', '.join(FLOATS)} can be"
            " trained",
        )
    return found


def _text_part(stored: dict[str, Stored], multimodal: bool) -> dict[str, Stored]:
    """Without the other parts of a multimodal model, which are left where they are."""
    if any(map(TOWER.search, stored)):
        return {
            TOWER.sub(r"\1", name): each
            for name, each in stored.items()
            if TOWER.search(name) or name.startswith("lm_head.")
        }
    if multimodal:  # as the hub has Qwen's
        return {name: each for name, each in stored.items() if not name.startswith("visual.")}
    return stored


def check_quantisation(model: Model) -> None:
    """Raises ConfigError for a model whose config says that its weights are quantised."""
    if quantised := model.architecture.get("quantization_config"):
        method = quantised.get("quant_method", "") if isinstance(quantised, Mapping) else quantised
        raise ConfigError(
            "model.name",
            model.name,
            f"has quantised weights (quantization_config: {method}), which can't be trained; "
            f"give the original model, or {RANDOM}",
        )


def weight_files(model: Model) -> list[Path]:
    """A model's own safetensors: what the config names, else model.safetensors, else an index's
    shards.

    Other files there (consolidated, another variant, original weights) are none of the model's. Of
    a hub id just these files are fetched.
    """
    name = str(model.name)
    directory = Path(name) if Path(name).is_dir() else None
    if directory is not None and (directory / ADAPTER).is_file():
        raise ConfigError("model.name", name, ADAPTER_REFUSED)

    def get(file: str) -> Path | None:
        return (
            _local(directory, file, name)
            if directory is not None
            else _from_hub(name, file, model.revision)
        )

    explicit = model.architecture.get(EXPLICIT)
    for file in (str(explicit),) if explicit else (SINGLE, INDEX):
        if (path := get(file)) is None:
            continue
        return [path] if not file.endswith(".index.json") else _shards(path, get, name)
    if explicit:
        raise ConfigError(
            "model.name", name, f"its config names {EXPLICIT}={explicit}, which is not there"
        )
    raise ConfigError("model.name", name, _nothing(directory))


def _shards(index: Path, get: Callable[[str], Path | None], name: str) -> list[Path]:
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        assert files and all(isinstance(file, str) for file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(
            "model.name",
            name,
            f"{index.name} is no index of shards ({type(error).__name__}: {error})",
        ) from error
    paths = {file: get(file) for file in files}
    if absent := [file for file, path in paths.items() if path is None]:
        raise ConfigError(
            "model.name",
            name,
            f"{absent[0]} is not there, one of {len(files)} shards that {index.name} names",
        )
    return [path for path in paths.values() if path is not None]


def _local(directory: Path, file: str, name: str) -> Path | None:
    path = directory / file
    if not path.resolve().is_relative_to(directory.resolve()) and ".." in Path(file).parts:
        raise ConfigError("model.name", name, f"names weights outside of its directory: {file}")
    if path.is_symlink() and not path.exists():
        raise ConfigError(
            "model.name", name, f"{file} is a link to {path.readlink()}, which is not there"
        )
    return path if path.is_file() else None


def _from_hub(name: str, file: str, revision: str | None) -> Path | None:
    try:
        return hub_file(name, file, revision)
    except LookupError:
        return None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            "model.name", name, f"the hub gave no weights ({reason}); {RANDOM}"
        ) from error


def _nothing(directory: Path | None) -> str:
    """Why there are no weights to read in a directory, or a hub repository (None)."""
    if directory is None:
        return f"has no {SINGLE} and no {INDEX} (other formats are not read); {RANDOM}"
    pickled = sorted(directory.glob("pytorch_model*.bin")) or sorted(directory.glob("*.bin"))
    if others := pickled or sorted(directory.glob("*.gguf")):
        return f"{no_safetensors(directory, others)}; {RANDOM}"
    there = ", ".join(path.name for path in sorted(directory.glob("*.safetensors*"))[:3])
    others_there = f" (from_pretrained doesn't read {there} either)" if there else ""
    return f"has no {SINGLE} and no {INDEX}{others_there}; {RANDOM}"


def _header(file: Path, name: str) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in list(tensors.keys())}
            return {
                key: Stored(file, key, tuple(each.get_shape()), str(each.get_dtype()))
                for key, each in slices.items()
            }
    except (SafetensorError, OSError, ValueError) as error:
        with file.open("rb") as start:
            pointer = start.read(len(LFS)) == LFS
        why = (
            "is a Git LFS pointer, not the weights; run git lfs pull"
            if pointer
            else f"is damaged, or no safetensors file ({error})"
        )
        raise ConfigError("model.name", name, f"{file.name} {why}") from error


# ---------------------------------------------------------------------------------------------- nam


def matched(stored: Mapping[str, Stored], model: Any, name: str) -> dict[str, Stored]:
    """Parameter (or saved buffer) of the model -> where it is stored.

    Names with or without the base model's prefix are the same, as in transformers.

    Args:
        model: a transformers model, on whatever device.
        name: of the model, for the user.

    Raises:
        ConfigError: tensors that are missing, unexpected or of another shape, by name.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    own = {key for key, _ in model.named_parameters()} | {
        key for key, _ in model.named_buffers() if key in shapes
    }
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    found: dict[str, Stored] = {}
    unexpected: list[str] = []
    for text_name, each in stored.items():
        key = _renamed(text_name, model.base_model_prefix, model.tp_family, shapes)
        if key not in shapes:
            unexpected += (
                [] if any(re.search(pattern, each.name) for pattern in ignored) else [each.name]
            )
        elif key in found:
            raise ConfigError(
                "model.name", name, f"{each.name} and {found[key].name} are both the model's {key}"
            )
        else:
            found[key] = each
    pair = tied_names(model)
    if pair is not None and pair[0] not in found and pair[1] in found:
        found[pair[0]] = found[pair[1]]  # a tied head alone is the embedding
    missing = sorted(own - set(found))
    if missing or unexpected:
        parts = [
            f"{what}:"
            f" {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("unexpected", sorted(unexpected)))
            if names
        ]
        head = (
            "; for a head that is the embedding: model.overrides.tie_word_embeddings=true"
            if missing == ["lm_head.weight"]
            else ""
        )
        raise ConfigError(
            "model.name", name, f"its tensors are not the model's; {'; '.join(parts)}{head}"
        )
    for key, each in found.items():
        if each.shape != shapes[key]:
            raise ConfigError(
                "model.name",
                name,
                f"{each.name} has shape {list(each.shape)}, the model's is {list(shapes[key])}",
            )
    return {key: each for key, each in found.items() if key in own}


def tied_names(model: Any) -> tuple[str, str] | None:
    """The names of the embedding's weight and of the head's that is the same parameter; None where
    the head is its own.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return None
    names = {id(module): key for key, module in model.named_modules()}
    return f"{names[id(embedding)]}.weight", f"{names[id(head)]}.weight"


def _renamed(name: str, prefix: str, family: Family, own: Mapping[str, Any]) -> str:
    """The model's name of a stored tensor: as it is, as its family's files have it, or with the
    base model's prefix taken off or put on.
    """
    ours = family.own_name(name)
    tried = (name, ours, name.removeprefix(f"{prefix}."), f"{prefix}.{name}", f"{prefix}.{ours}")
    return next((each for each in tried if each in own), name)


def is_untied(stored: Mapping[str, Stored], model: Any, family: Family) -> bool:
    """Whether a model whose config ties has, in its files, a head of its own: then transformers
    doesn't tie them.
    """
    pair = tied_names(model)
    if pair is None:
        return False
    own = model.state_dict()
    prefix = model.base_model_prefix
    places = {_renamed(name, prefix, family, own): each for name, each in stored.items()}
    embedding, head = (places.get(key) for key in pair)
    return embedding is not None and head is not None and not _same(embedding, head)


def _same(one: Stored, two: Stored) -> bool:
    """Whether two stored matrices hold the same values, in float32; read in pieces."""
    if one.shape != two.shape:
        return False
    with (
        safe_open(one.file, framework="pt") as first,
        safe_open(two.file, framework="pt") as second,
    ):
        a, b = first.get_slice(one.name), second.get_slice(two.name)
        return all(
            bool((a[start : start + ROWS].float() == b[start : start + ROWS].float()).all())
            for start in range(0, one.shape[0], ROWS)
        )


ROWS = 4096
