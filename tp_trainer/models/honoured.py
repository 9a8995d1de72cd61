"""Which fields of a transformers config are honoured: any other that is set is refused by name.

transformers' own model would compute something else than what is trained here, or the field does
nothing at all; silence would hide either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from transformers.activations import ACT2FN

from tp_trainer.config import FAMILIES, ConfigError, Model, nearest, shown
from tp_trainer.config.architecture import FROM_FILE
from tp_trainer.config.rope import LOCAL, NEW, SCALING, THETA
from tp_trainer.models.families import Family
from tp_trainer.models.files import EXPLICIT

NOT_OURS = (
    FROM_FILE,
    "model_type",
    "torch_dtype",
    "dtype",
    "quantization_config",
    "auto_map",
    EXPLICIT,
)
ELSEWHERE = {  # fields that a config may have, and that nothing here goes by
    "dtype": "weights are kept in float32; parallelism.param_dtype is the dtype of compute",
    "torch_dtype": "weights are kept in float32; parallelism.param_dtype is the dtype of compute",
    "quantization_config": (
        "quantised weights can't be trained; parallelism.float8 quantises matmuls"
    ),
}
# taken by configs that have rope_parameters
LEGACY_ROPE = (THETA, SCALING, LOCAL, "partial_rotary_factor")
# what transformers reads of any config, whether its class has the field or not
ANY = (
    "attention_chunk_size",
    "gradient_checkpointing",
    "is_causal",
    "layer_types",
    "per_layer_config",
    "use_bidirectional_attention",
)
ON = {"is_causal": True, "return_dict": True}  # fields whose value is not off where nothing is set
ACTIVATIONS = ("hidden_act", "hidden_activation")


def known_fields(config_class: Any) -> set[str]:
    """The field names that a family's config may have."""
    names = set(_defaults(config_class)) | set(config_class.attribute_map) | set(NOT_OURS)
    return names | {"_name_or_path", *ANY} | (set(LEGACY_ROPE) if NEW in names else set())


def _is_sink(name: str) -> bool:
    """Attention sinks, under whatever name: no family here has them."""
    return "sink" in name


def check_fields(model: Model, config_class: Any, family: Family) -> None:
    """Whether each field is known, is honoured or off, and has a value that there is.

    Raises:
        ConfigError: the first that doesn't.
    """
    fields = model.architecture
    for name in ELSEWHERE.keys() & model.overrides.keys():
        if model.overrides[name] is not None:
            raise ConfigError(f"model.overrides.{name}", model.overrides[name], ELSEWHERE[name])
    known = known_fields(config_class)
    for name in model.overrides if FROM_FILE in fields else [*model.overrides, *fields]:
        if name not in known and not _is_sink(name):
            near = nearest(name, sorted(known))
            hint = f"; did you mean {near}?" if near else ""
            raise ConfigError(_key(name, model), None, f"{_type(model)} has no such field{hint}")
    _check_honoured(model, config_class, family)
    values = _values(model, config_class)
    for name in ACTIVATIONS:
        if isinstance(value := values.get(name), str) and value not in ACT2FN:
            near = nearest(value, sorted(ACT2FN))
            hint = f"; did you mean {near}?" if near else f"; there are: {', '.join(ACT2FN)}"
            raise ConfigError(
                _key(name, model), value, f"transformers has no such activation{hint}"
            )
    padding, size = values.get("pad_token_id"), values["vocab_size"]
    if isinstance(padding, int) and padding >= size:
        raise ConfigError(
            _key("pad_token_id", model),
            padding,
            f"{_type(model)}'s own, but the vocabulary has only {size} entries; give"
            " model.overrides.pad_token_id=null",
        )


def check_layers(model: Model, family: Family, kinds: Iterable[str]) -> None:
    """Raises ConfigError for a kind of layer that isn't served.

    Args:
        kinds: `layer_types` of the config that transformers made.
    """
    if unknown := sorted(set(kinds) - set(family.layer_types)):
        allowed = " or ".join(family.layer_types)
        raise ConfigError(_key("layer_types", model), unknown[0], f"layers can only be {allowed}")


def _check_honoured(model: Model, config_class: Any, family: Family) -> None:
    found = list(_not_honoured(model, config_class, family))
    if found and not is_certified(model):
        names = ", ".join(name for name, _ in found)
        raise ConfigError(
            "model.architecture.model_type",
            _type(model),
            f"is in no table of families, and its config sets what none of them honours: {names};"
            " docs/families.md lists those that can be trained, and model.family brings a record",
        )
    for name, off in found:
        raise _unhonoured(name, model, off)


def is_certified(model: Model) -> bool:
    """Whether the model's family was held against plain transformers, by us or by who brought a
    record of it.
    """
    return _type(model) in FAMILIES or model.family is not None


def _not_honoured(model: Model, config_class: Any, family: Family) -> Iterator[tuple[str, object]]:
    """Fields that are set to what nothing here honours, and the value that lets the model be
    trained.
    """
    defaults, values = _defaults(config_class), _values(model, config_class)
    others = set(filter(_is_sink, values))
    # a class without layer types takes all layers for the same
    uneven = set(values.get("layer_types") or ["full_attention"]) != {"full_attention"}
    if uneven and "layer_types" not in defaults:
        yield "layer_types", None
    for name in sorted(others.union(ANY, defaults)):
        own, wanted = defaults.get(name, ON.get(name)), name in ON
        if bool(values.get(name, own)) != wanted and not family.lets_through(name):
            yield name, own if bool(own) == wanted else wanted


def _unhonoured(name: str, model: Model, off: object) -> ConfigError:
    """`off`: the value that lets the model be trained."""
    value = model.architecture.get(name)
    from_file = FROM_FILE in model.architecture and name not in model.overrides
    place = f" (in the config.json of {model.name})" if from_file else ""
    hint = "null" if off is None else shown(off)
    return ConfigError(
        _key(name, model),
        "..." if isinstance(value, (dict, list)) else value,
        f"is not honoured in training {_type(model)}{place}; model.overrides.{name}={hint} trains"
        " the model without it",
    )


def _values(model: Model, config_class: Any) -> dict[str, Any]:
    """Each field's value, the class's own where the config doesn't say."""
    names = config_class.attribute_map
    given = {names.get(name, name): value for name, value in model.architecture.items()}
    return _defaults(config_class) | given


def _defaults(config_class: Any) -> dict[str, Any]:
    """The fields of a config class, with their defaults; None where they are made."""
    return {
        each.name: None if each.default is dataclasses.MISSING else each.default
        for each in dataclasses.fields(config_class)
    }


def _key(name: str, model: Model) -> str:
    return f"model.{'overrides' if name in model.overrides else 'architecture'}.{name}"


def _type(model: Model) -> str:
    return str(model.architecture["model_type"])
