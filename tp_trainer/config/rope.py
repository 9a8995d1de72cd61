"""Rope fields put over a transformers config, whichever form either of them has.

Old form: `rope_theta`, `rope_scaling={rope_type or type, factor, ...}`, and `rope_local_base_freq`
for the sliding layers of Gemma 3. New form (transformers 5): `rope_parameters`, one for all layers
or one for each layer type. A config of the new form ignores the old fields, and old `rope_scaling`
wins over
`rope_parameters`: put side by side, one of them is silently lost.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from tp_trainer.config.errors import ConfigError

NEW, THETA, SCALING, LOCAL = "rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq"
ROPE = (NEW, THETA, SCALING, LOCAL)
ORIGINAL = "original_max_position_embeddings"
GLOBAL_LAYERS, LOCAL_LAYERS = "full_attention", "sliding_attention"


def with_rope(fields: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields with the typed rope fields in force, in the new form.

    A dictionary that names a rope type replaces the one that is there, but for theta; one that
    doesn't changes its single values.

    Raises:
        ConfigError: the typed fields contradict each other, or don't say which layers they mean.
    """
    typed = {key: copy.deepcopy(typed[key]) for key in ROPE if key in typed}
    if not typed:
        return dict(fields)
    for key in (NEW, SCALING):
        if not isinstance(typed.get(key), Mapping | None):
            raise _refused(
                key, typed[key], "must be keys and values, e.g. {rope_type: linear, factor: 2.0}"
            )
    others = {key: value for key, value in fields.items() if key not in ROPE}
    base = _new_form({key: fields[key] for key in ROPE if fields.get(key) is not None})
    nested = _is_nested(base) or _is_nested(typed.get(NEW) or {})
    if NEW in typed:
        base = _with_new(base, typed[NEW] or {"rope_type": "default"}, nested)
    target = base.setdefault(GLOBAL_LAYERS, {"rope_type": "default"}) if nested else base
    if SCALING in typed:
        scaling = _renamed(typed[SCALING] or {"rope_type": "default"})
        _agree(typed, scaling)
        changed = _over(target, scaling)
        target.clear()
        target.update(changed)
    if THETA in typed:
        _agree(typed, {THETA: typed[THETA]})
        target[THETA] = typed[THETA]
    if LOCAL in typed:
        if not nested:
            raise _refused(
                LOCAL, typed[LOCAL], "this model's rope is the same in all layers; give rope_theta"
            )
        base.setdefault(LOCAL_LAYERS, {"rope_type": "default"})[THETA] = typed[LOCAL]
    return {**others, NEW: base}


def positions(fields: Mapping[str, Any]) -> int:
    """The positions that a model with these config fields has, its rope's scaling included.

    yarn has factor x `original_max_position_embeddings`, or `max_position_embeddings` where that
    is more; linear and dynamic have `max_position_embeddings` x factor. For llama3, longrope and
    all others that field holds as it stands. Where rope goes by layer type, layers with a sliding
    window don't count: they look no further than it.
    """
    stated = int(fields["max_position_embeddings"])
    given = {key: fields[key] for key in (NEW, SCALING) if isinstance(fields.get(key), Mapping)}
    rope = _new_form(given | ({LOCAL: fields[LOCAL]} if fields.get(LOCAL) is not None else {}))
    kinds = {key: each for key, each in rope.items() if isinstance(each, Mapping)}
    wide = [each for key, each in kinds.items() if key != LOCAL_LAYERS]
    return min(_scaled(each, stated, fields) for each in wide or [*kinds.values()] or [rope])


def _scaled(rope: Mapping[str, Any], stated: int, fields: Mapping[str, Any]) -> int:
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor >= 1:
        return stated  # none, or refused later
    if kind in ("linear", "dynamic"):
        return int(stated * factor)
    if kind != "yarn":
        return stated
    # beside rope, as Phi has it, it wins in transformers
    original = fields.get(ORIGINAL) or rope.get(ORIGINAL) or stated
    return max(stated, int(original * factor)) if isinstance(original, int) else stated


def _new_form(base: Mapping[str, Any]) -> dict[str, Any]:
    """A config's rope fields in the new form, with transformers' precedence."""
    new, scaling = copy.deepcopy(base.get(NEW) or {}), copy.deepcopy(base.get(SCALING) or {})
    if LOCAL in base or _is_nested(new):
        layers = {
            GLOBAL_LAYERS: {**(new.get(GLOBAL_LAYERS) or {"rope_type": "default"}), **scaling},
            LOCAL_LAYERS: new.get(LOCAL_LAYERS) or {"rope_type": "default"},
        }
        for layer, key in ((GLOBAL_LAYERS, THETA), (LOCAL_LAYERS, LOCAL)):
            if key in base:
                layers[layer].setdefault(THETA, base[key])
        return {**new, **layers}
    params = _renamed(scaling or new)
    params.setdefault("rope_type", "default")
    if THETA in base:
        params.setdefault(THETA, base[THETA])
    return params


def _with_new(base: dict[str, Any], new: dict[str, Any], nested: bool) -> dict[str, Any]:
    """The typed rope_parameters over those that are there."""
    if not nested:
        return _over(base, _renamed(new))
    if not _is_nested(new):
        raise _refused(
            NEW, new, f"this model's are by layer type; give e.g. {NEW}.{GLOBAL_LAYERS}.rope_theta"
        )
    layers = base if _is_nested(base) else {GLOBAL_LAYERS: base}
    return {
        **layers,
        **{
            layer: _over(layers.get(layer) or {}, _renamed(each or {}))
            for layer, each in new.items()
        },
    }


def _over(base: Mapping[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """Another rope type takes over what every type has; the same one, or none, all that isn't
    typed.
    """
    if "rope_type" in typed and typed["rope_type"] != base.get("rope_type"):
        base = {key: base[key] for key in (THETA, "partial_rotary_factor") if key in base}
    return {**base, **typed}


def _renamed(params: dict[str, Any]) -> dict[str, Any]:
    """`type` as it was once called is `rope_type`."""
    kind = params.pop("type", None)
    return params if kind is None else {"rope_type": kind, **params}


def _is_nested(params: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Mapping) for value in params.values())


def _agree(typed: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises ConfigError where old and new fields were typed with different values."""
    new = _renamed(dict(typed.get(NEW) or {}))
    new = new.get(GLOBAL_LAYERS) or new
    for key, value in values.items():
        if key in new and new[key] != value:
            raise _refused(
                NEW,
                None,
                f"{key} is {new[key]} there and {value} in the fields of the old form; give one of"
                " them",
            )


def _refused(key: str, value: object, message: str) -> ConfigError:
    return ConfigError(f"model.overrides.{key}", value, message)
