"""The files of an export beside its weights: config.json, generation_config.json, the tokenizer,
and the code that these name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tp_trainer.checkpoint.store import Store, VerifiedCheckpoint
from tp_trainer.config import ConfigError, Model, hub_file
from tp_trainer.data.tokenizer import load_tokenizer

Shapes = dict[str, tuple[int, ...]]  # of parameters, by name
Constants = dict[str, Any]  # buffers as numbers, nested as their dimensions are, by name


@dataclass(frozen=True)
class StoredRun:
    """What a run's config.yaml says of its model and tokenizer."""

    architecture: dict[str, Any]  # the fields of a transformers config
    family: str | None  # package.module:name of its record
    model_name: str | None  # hub id or directory
    revision: str | None
    pretrained: bool
    trust_remote_code: bool
    tokenizer_name: str | None  # None: random tokens

    @classmethod
    def of(cls, run_dir: str) -> StoredRun:
        """Raises ValueError, with the reason, where there is none or it can't be told from it."""
        try:
            stored = Store(run_dir).read_yaml("config.yaml")
        except ValueError as error:
            raise ValueError(f"can't be read ({error}): it says which model this is") from error
        if stored is None:
            raise ValueError("is missing: it says which model this is")
        model, data = stored.get("model"), stored.get("data")
        if not (
            isinstance(model, dict)
            and isinstance(model.get("architecture"), dict)
            and isinstance(data, dict)
        ):
            raise ValueError("states no model.architecture and data: it is no run's")
        return cls(
            architecture=model["architecture"],
            family=model.get("family"),
            model_name=model.get("name"),
            revision=model.get("revision"),
            pretrained=model.get("weights") == "pretrained",
            trust_remote_code=bool(model.get("trust_remote_code")),
            tokenizer_name=data.get("tokenizer"),
        )

    def tokenizer(self) -> Any | None:
        """The run's tokenizer; None where it had random tokens."""
        if self.tokenizer_name is None:
            return None
        return load_tokenizer(str(self.tokenizer_name), self.trust_remote_code)


def describe(
    found: VerifiedCheckpoint, stored: StoredRun, tokenizer: Any | None, dtype: str, directory: Path
) -> tuple[Shapes, Constants]:
    """Write config.json, generation_config.json and the tokenizer's files.

    Returns:
        the shapes of the parameters to write, and the buffers that belong beside them.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    import torch

    from tp_trainer.checkpoint.restoring import stored_parameters
    from tp_trainer.models.description import TIED, meta_model
    from tp_trainer.models.files import tied_names

    architecture = dict(stored.architecture)
    model = meta_model(architecture)
    have = stored_parameters(found.path)
    # its files had a head of its own
    if (pair := tied_names(model)) is not None and pair[1] in have:
        model = meta_model({**architecture, TIED: False})
    # a tied head goes by its embedding's name
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if wrong := sorted(
        name for name in shapes.keys() | have.keys() if shapes.get(name) != have.get(name)
    ):
        raise ConfigError(
            "checkpoint.path",
            found.path,
            f"its tensors are not those of the model in the run's config.yaml: {wrong[0]} "
            f"has shape {have.get(wrong[0])}, the model's is {shapes.get(wrong[0])}",
        )
    model.config.architectures, model.config.dtype = [type(model).__name__], getattr(torch, dtype)
    if "auto_map" in architecture:
        model.config.auto_map = architecture["auto_map"]
    model.config.save_pretrained(directory)
    _write_generation_config(model, stored, tokenizer, directory / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        _bring_code(directory / "tokenizer_config.json", str(stored.tokenizer_name))
    _bring_code(directory / "config.json", str(stored.model_name))
    return shapes, _constants(model)


def stored_names(stored: StoredRun, own: Iterable[str]) -> dict[str, str]:
    """The names that parameters have in the files of the model's family, where it is another.

    Raises:
        ConfigError: the run brought a record of its own, which isn't found here.
    """
    from tp_trainer.models.families import family_of

    family = family_of(Model(architecture=stored.architecture, family=stored.family))
    names = {name: family.stored_name(name) for name in own}
    return {name: other for name, other in names.items() if other != name}


def _constants(model: Any) -> Constants:
    """The buffers that transformers saves with the weights, as its classes make them."""
    from tp_trainer.models.description import with_buffers

    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not (names := [name for name in model.state_dict() if name not in parameters]):
        return {}
    made = with_buffers(model.config)
    return {name: made.get_buffer(name).tolist() for name in names}


def _bring_code(config: Path, source: str) -> None:
    """Copy the code that `auto_map` of a written config names from where it came; without it, that
    entry goes.

    Args:
        source: a directory or hub id.
    """
    content = json.loads(config.read_text(encoding="utf-8"))
    if not (classes := content.get("auto_map")):
        return
    names = [
        name
        for value in classes.values()
        for name in (value if isinstance(value, list) else [value])
        if name
    ]
    # a--b: of another repository
    needed = {f"{name.partition('.')[0]}.py" for name in names if "--" not in name}
    if missing := [file for file in needed if not (config.parent / file).is_file()]:
        for path in sorted(_code_directory(source).glob("*.py")):
            shutil.copyfile(path, config.parent / path.name)
        missing = [file for file in missing if not (config.parent / file).is_file()]
    if missing:
        del content["auto_map"]
        config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _code_directory(source: str) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.py"]))
    except Exception:  # no hub id, or the hub is out of reach: there is no code to be had
        return Path(os.devnull)


def other_tokenizer(tokenizer: Any | None, directory: Path, output: str) -> str | None:
    """A sentence for the user where transformers' AutoTokenizer makes another tokenizer of the
    files written.

    For some model types (qwen2 among them) it takes a class that reads but the vocabulary and
    splits text in its own way.
    """
    from transformers import AutoTokenizer

    if tokenizer is None or not hasattr(tokenizer, "backend_tokenizer"):
        return None
    other = AutoTokenizer.from_pretrained(directory)
    one, two = (json.loads(each.backend_tokenizer.to_str()) for each in (tokenizer, other))
    parts = [
        part
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        if one[part] != two[part]
    ]
    parts += [
        part for part in ("vocab", "merges") if one["model"].get(part) != two["model"].get(part)
    ]
    if not parts:
        return None
    return (
        f"for this model type AutoTokenizer takes {type(other).__name__}, which has another"
        f" {' and '.join(parts)} than the run's tokenizer; the run's own:"
        f" PreTrainedTokenizerFast.from_pretrained('{output}')"
    )


def _write_generation_config(
    model: Any, stored: StoredRun, tokenizer: Any | None, target: Path
) -> None:
    """The pretrained model's own file, as it stands, where it can be had (its end-of-text ids may
    be more than config.json says).

    Else what config.json says, which is where sampling once stood, and the ids of the tokenizer
    that it was trained with.
    """
    from transformers import GenerationConfig

    name = stored.model_name
    if stored.pretrained and name:
        try:
            path = (
                Path(name) / target.name
                if Path(name).is_dir()
                else hub_file(name, target.name, stored.revision)
            )
            shutil.copyfile(path, target)
            return
        except (OSError, LookupError):
            pass  # it has none, or the hub is out of reach
    generation = model.generation_config
    for each in GenerationConfig._get_default_generation_params():
        if (value := stored.architecture.get(each)) is not None:
            setattr(generation, each, value)
    if tokenizer is not None and not stored.pretrained:  # the architecture's ids are another's
        for each in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(generation, each, getattr(tokenizer, each))
    generation.save_pretrained(target.parent)
