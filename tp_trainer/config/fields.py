"""Fields put over a transformers config, and whether the numbers make sense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tp_trainer.config.errors import ConfigError
from tp_trainer.config.rope import ROPE, with_rope


def with_overrides(fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with the overrides in force: rope in either form, another depth layer by layer."""
    layers = overrides.get("num_hidden_layers")
    if isinstance(layers, int) and not isinstance(layers, bool):
        fields = with_depth(fields, layers)
    others = {key: value for key, value in overrides.items() if key not in ROPE}
    return {**with_rope(fields, overrides), **others}


def with_depth(fields: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The fields of a model of another depth.

    Lists with a value for each layer are cut; those that are too short are left out, and
    transformers derives them.
    """
    depth, changed = fields.get("num_hidden_layers"), {**fields, "num_hidden_layers": layers}
    for key, value in fields.items():
        if isinstance(value, list) and len(value) == depth != layers:
            changed[key] = value[:layers]
            if layers > len(value):
                del changed[key]
    return changed


RANGES: list[tuple[str, str, Any]] = [  # of field names, what is allowed, the test
    (r".*(dropout|pdrop)", "in [0, 1)", lambda value: 0 <= value < 1),
    (
        r".*(norm_eps|norm_epsilon|softcapping)|rope_theta|rope_local_base_freq",
        "above 0",
        lambda value: value > 0,
    ),
    (r"initializer_range", "at least 0", lambda value: value >= 0),
    (r"sliding_window|original_max_position_embeddings", "at least 1", lambda value: value >= 1),
]


# what no config class of transformers checks
NUMBERS = r"rope_theta|rope_local_base_freq|factor|.*norm_eps(ilon)?"


def check_ranges(numbers: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for a number that no model can have."""
    rope = numbers.get("rope_parameters")
    nested = rope if isinstance(rope, Mapping) else {}
    inner = [each for each in nested.values() if isinstance(each, Mapping)] or [nested]
    for key, value in [*numbers.items(), *(item for each in inner for item in each.items())]:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            if value is not None and re.fullmatch(NUMBERS, key):
                raise ConfigError(where, None, f"{key} is {value!r}, must be a number")
            continue
        for name, words, holds in RANGES:
            if re.fullmatch(name, key) and not holds(value):
                raise ConfigError(where, None, f"{key} is {value}, must be {words}")
