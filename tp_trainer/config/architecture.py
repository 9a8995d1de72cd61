"""What the driver knows of a model without loading it: the numbers of its transformers config."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tp_trainer.config.errors import ConfigError
from tp_trainer.config.schema import Config, Model


def architecture(config: Config) -> Architecture:
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
        """From the fields of a transformers config. Raises ConfigError naming the first one that is missing."""
        numbers = {**numbers, **(numbers.get("text_config") or {})}

        def need(name: str) -> int:
            value = numbers.get(name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(where, None, f"{name} is {'missing' if value is None else f'{value!r}, not a whole number'}: "
                                  "only dense decoders that state it can be trained")
            return value

        if not numbers.get("model_type"):
            raise ConfigError(where, None, "model_type is missing; give model.name=<hub id or directory> or model=<group>")
        experts = numbers.get("num_local_experts") or numbers.get("num_experts") or numbers.get("n_routed_experts")
        if experts:
            raise ConfigError(where, None, f"is a mixture of {experts} experts; only dense models can be trained")
        heads, hidden = need("num_attention_heads"), need("hidden_size")
        return cls(
            model_type=str(numbers["model_type"]),
            vocab_size=need("vocab_size"),
            hidden_size=hidden,
            intermediate_size=need("intermediate_size"),
            num_hidden_layers=need("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=numbers.get("num_key_value_heads") or heads,
            head_dim=numbers.get("head_dim") or hidden // heads,
            max_position_embeddings=need("max_position_embeddings"),
            tie_word_embeddings=bool(numbers.get("tie_word_embeddings", False)),
        )

    @property
    def num_parameters(self) -> int:
        """Parameters of a gated-MLP decoder, biases and norms left out (under 0.1 % of any real model)."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * (attention + mlp) + tables * self.vocab_size * self.hidden_size

    def tp_degrees(self) -> list[int]:
        """The tensor-parallel degrees that work: they divide heads and intermediate size, and divide or, where they can be
        replicated, are a multiple of the key/value heads. The vocabulary may be split unevenly."""
        common, kv = math.gcd(self.num_attention_heads, self.intermediate_size), self.num_key_value_heads
        return [n for n in range(1, common + 1) if common % n == 0 and (kv % n == 0 or (n % kv == 0 and self.replicates_key_value_heads))]

    @property
    def replicates_key_value_heads(self) -> bool:
        """Not where one norm spans the keys of all heads."""
        return self.model_type != "olmo2"


def architecture_fields(model: Model) -> dict[str, Any]:
    """The transformers config fields of the chosen model: the group's, the directory's, or the hub's config.json.

    The group's architecture holds for the name that it carries (`_name_or_path`); another `model.name` replaces it.
    """
    own = model.architecture.get("_name_or_path")
    if model.architecture and model.name in (None, own):
        fields = dict(model.architecture)
    elif model.name is None:
        raise ConfigError("model.name", None, "nothing names a model: give model=<group> or model.name=<hub id or directory>")
    else:
        fields = json.loads(_config_file(model.name).read_text())
    if "num_hidden_layers" in model.overrides:
        fields.pop("layer_types", None)  # one for each layer, written by transformers 5: it derives them anew
    return {**fields, **model.overrides}


HUB_TIMEOUT = 3  # seconds until the hub counts as out of reach


def _config_file(name: str) -> Path:
    """config.json of a model directory, or of a hub id (fetched, or from the hub's cache)."""
    if Path(name).is_dir():
        path = Path(name) / "config.json"
        if not path.is_file():
            raise ConfigError("model.name", name, "this directory has no config.json")
        return path
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ConfigError("model.name", name, "no such directory, and not a hub id (owner/model)")
    try:
        return hub_file(name, "config.json")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError("model.name", name, f"no such directory, and the hub gave no config.json ({reason})") from error


def hub_file(name: str, file: str) -> Path:
    """A file of a hub id, fetched or from the hub's cache. Raises soon where the hub is out of reach."""
    # huggingface_hub imports in 0.2 s, and only where the hub is asked; its own retries would take half a minute
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(name, file)
    if isinstance(cached, str):
        return Path(cached)
    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set, and it is not in the cache")
    with socket.create_connection((urlsplit(hf_hub_url(name, file)).hostname or "", 443), timeout=HUB_TIMEOUT):
        pass
    return Path(hf_hub_download(name, file, etag_timeout=HUB_TIMEOUT))
