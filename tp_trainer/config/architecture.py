"""What the driver knows of a model without loading it: the numbers of its transformers config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tp_trainer.config.errors import ConfigError
from tp_trainer.config.fields import check_ranges, with_overrides
from tp_trainer.config.hub import hub_file
from tp_trainer.config.quoting import assignment, pasted, word
from tp_trainer.config.schema import Model, Settings
from tp_trainer.config.towers import PARTS, text_part


def architecture(config: Settings) -> Architecture:
    """The numbers of the chosen model."""
    where = f"model.name={config.model.name}" if config.model.name else "model.architecture"
    return Architecture.of(config.model.architecture, where)


@dataclass(frozen=True)
class Architecture:
    """The numbers of a dense decoder that the driver needs, under transformers' names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, numbers: Mapping[str, Any], where: str) -> Architecture:
        """From the fields of a transformers config. Raises ConfigError naming the first one that is
        missing.
        """

        def refuse(name: str, why: str) -> ConfigError:
            return ConfigError(where, None, f"{name} is {numbers[name]!r}, {why}")

        def need(name: str, default: int | None = None) -> int:
            value = numbers.get(name) if numbers.get(name) is not None else default
            if value is None:
                raise ConfigError(
                    where,
                    None,
                    f"{name} is missing: only dense decoders that state it can be trained",
                )
            if isinstance(value, bool) or not isinstance(value, int):
                raise refuse(name, "not a whole number")
            if value < 1:
                raise refuse(name, "must be at least 1")
            return value

        _check_kind(numbers, where)
        experts = (
            numbers.get("num_local_experts")
            or numbers.get("num_experts")
            or numbers.get("n_routed_experts")
        )
        if experts:
            raise ConfigError(
                where, None, f"is a mixture of {experts} experts; only dense models can be trained"
            )
        heads, hidden = need("num_attention_heads"), need("hidden_size")
        vocab_size = need("vocab_size")
        if heads % need("num_key_value_heads", heads):
            raise refuse("num_key_value_heads", f"must divide num_attention_heads={heads}")
        check_ranges(numbers, where)
        padding = numbers.get("pad_token_id")
        if isinstance(padding, int) and not -vocab_size <= padding < vocab_size:
            raise refuse("pad_token_id", f"but the vocabulary has only {vocab_size} entries")
        return cls(
            model_type=str(numbers["model_type"]),
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=need("intermediate_size"),
            num_hidden_layers=need("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=need("num_key_value_heads", heads),
            head_dim=need("head_dim", hidden // heads),
            max_position_embeddings=need("max_position_embeddings"),
            tie_word_embeddings=bool(numbers.get("tie_word_embeddings", False)),
        )

    @property
    def num_parameters(self) -> int:
        """Parameters of a gated-MLP decoder, biases and norms left out (under 0.1 % of any real
        model).
        """
        attention = (
            self.hidden_size
            * self.head_dim
            * 2
            * (self.num_attention_heads + self.num_key_value_heads)
        )
        mlp = 3 * self.hidden_size * self.intermediate_size
        tables = 1 if self.tie_word_embeddings else 2
        return (
            self.num_hidden_layers * (attention + mlp) + tables * self.vocab_size * self.hidden_size
        )

    def tp_degrees(self) -> list[int]:
        """The tensor-parallel degrees that work: they divide heads and intermediate size, and
        divide or are a multiple of the key/value heads (a few families can't replicate those:
        models.split). The vocabulary may be split unevenly.
        """
        common, kv = (
            math.gcd(self.num_attention_heads, self.intermediate_size),
            self.num_key_value_heads,
        )
        return [n for n in range(1, common + 1) if common % n == 0 and (kv % n == 0 or n % kv == 0)]


def _check_kind(numbers: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError where no model type is given, and for a multimodal wrapper."""
    if not numbers.get("model_type"):
        raise ConfigError(
            where,
            None,
            "model_type is missing; give model.name=<hub id or directory> or model=<group>",
        )
    if parts := [name for name in PARTS if isinstance(numbers.get(name), Mapping)]:
        raise ConfigError(
            "model.architecture.model_type",
            str(numbers["model_type"]),
            f"is made of several models ({', '.join(parts)}); only a text model by itself can be"
            " trained",
        )


def architecture_fields(model: Model) -> dict[str, Any]:
    """The transformers config fields of the chosen model: the group's, the directory's, or the
    hub's config.json.

    The group's architecture holds for the name that it carries (`_name_or_path`); another
    `model.name` replaces it.
    """
    own = model.architecture.get("_name_or_path")
    if model.architecture and model.name in (None, own):
        fields = dict(model.architecture)
    elif model.name is None:
        raise ConfigError(
            "model.name",
            None,
            "nothing names a model: give model=<group> or model.name=<hub id or directory>",
        )
    else:
        content = _read_config(model.name, model.revision)
        text = text_part(content)
        fields = {**content, FROM_FILE: True}
        if text is not None:
            fields = {**text, FROM_FILE: str(content["model_type"])}
        if own is None and FROM_FILE not in model.architecture:  # written beside the name, by hand
            _check_agrees(model.architecture, fields, model.name)
    return with_overrides(fields, model.overrides)


def _check_agrees(written: Mapping[str, Any], fields: Mapping[str, Any], name: str) -> None:
    """Raises ConfigError where a config says other numbers than the model that it names."""
    for key, value in written.items():
        if key not in fields or fields[key] != value:
            says = repr(fields[key]) if key in fields else "nothing"
            why = f"the config.json of model.name={name} says {says}"
            hint = f"leave it out, or give model.overrides.{key}"
            raise ConfigError(f"model.architecture.{key}", value, f"{why}; {hint}")


# of fields that came from a file (of a multimodal model's, its type: they are its text part's):
# among them may be some that transformers doesn't know
FROM_FILE = "_from_config_json"


def _read_config(name: str, revision: str | None) -> dict[str, Any]:
    """The content of a model's config.json. Raises ConfigError."""
    path = _config_file(name, revision)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("model.name", name, f"its config.json can't be read ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError("model.name", name, "its config.json holds no keys and values")
    return content


def _config_file(name: str, revision: str | None) -> Path:
    """config.json of a model directory, or of a hub id (fetched, or from the hub's cache)."""
    place = Path(name)
    if place.is_dir():
        path = place / "config.json"
        if path.is_file():
            return path
        if weights := sorted(place.glob("*.gguf")):
            raise ConfigError("model.name", name, no_safetensors(place, weights))
        if (place / ADAPTER).is_file():
            raise ConfigError("model.name", name, ADAPTER_REFUSED)
        raise ConfigError("model.name", name, "this directory has no config.json")
    if place.is_file():
        why = (
            no_safetensors(place.parent, [place])
            if place.suffix == ".gguf"
            else f"is a file; give its directory: {pasted('model.name', place.parent)}"
        )
        raise ConfigError("model.name", name, why)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ConfigError("model.name", name, "no such directory, and not a hub id (owner/model)")
    try:
        return hub_file(name, "config.json", revision)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            "model.name", name, f"no such directory, and the hub gave no config.json ({reason})"
        ) from error


ADAPTER = "adapter_config.json"
ADAPTER_REFUSED = (
    "holds a PEFT adapter, not a model; merge it into its base first (PeftModel.merge_and_unload)"
    " and give the merged one"
)


def no_safetensors(directory: Path, files: Sequence[Path]) -> str:
    """Why weights in other formats aren't read, and the Python that converts them once."""
    place, target = str(directory), f"{directory.name}-safetensors"
    if gguf := [path for path in files if path.suffix == ".gguf"]:
        more = [
            "import torch",
            "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T, GgufConfig",
            f"d, f = {place!r}, {gguf[0].name!r}",
            (
                "m = M.from_pretrained(d, gguf_file=f, dtype=torch.float32,"
                " quantization_config=GgufConfig(dequantize=True))"
            ),
            "m.config.__dict__.pop('quantization_config', None)",
            f"m.save_pretrained({target!r})",
            f"T.from_pretrained(d, gguf_file=f).save_pretrained({target!r})",
        ]
        kind = f"GGUF weights ({gguf[0].name})"
    else:
        more = [
            "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T",
            f"M.from_pretrained({place!r}, dtype='auto').save_pretrained({target!r})",
            f"T.from_pretrained({place!r}).save_pretrained({target!r})",
        ]
        kind = f"pickled weights ({files[0].name})"
    code = "; ".join(more)
    code = word(code) if set(code) & set('"$`\\!') else f'"{code}"'
    return (
        f"has only {kind}, which are not read; convert them once: python -c {code},"
        f" then give {assignment('model.name', target)}"
    )
