"""The split table: what each module of a model is to tensor parallelism, and so how each parameter
lies over tp.

Derived from the plan that transformers keeps beside each family (`base_model_tp_plan`) and the
family's record, completed for what both leave out: token embedding, head, the regions between them,
and which replicated gradients are parts of a sum.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel

from tp_trainer.config import ConfigError
from tp_trainer.models.families import Family
from tp_trainer.parallel.tensor import Part, Role, split_dim

PLAN = {
    "colwise": Role.COLUMN,
    "rowwise": Role.ROW,
    "replicated_with_grad_allreduce": Role.PER_HEAD,
}


def split_table(model: PreTrainedModel, tp: int) -> dict[str, Part]:
    """Full module name -> its part, for every module that has one, at tensor-parallel degree `tp`.

    Args:
        model: with its family's record, as `description.described` makes it.

    Raises:
        ConfigError: the family has no plan, or one that the table can't serve.
    """
    config, family = model.config, model.tp_family
    plan = _plan(config, family)
    heads, kv_heads = config.num_attention_heads, _key_value_heads(config)
    modules = dict(model.named_modules())
    prefix = model.base_model_prefix + "."
    table: dict[str, Part] = {}
    for name in modules:
        starred = _starred(name.removeprefix(prefix))
        role = plan.get(starred)
        if role is None:
            continue
        parent, _, last = name.rpartition(".")
        table[name] = Part(role)
        if role is Role.COLUMN and last in ("k_proj", "v_proj") and kv_heads % tp:
            if not family.replicates_keys:
                raise _undivided(config, tp)
            table[name] = Part(Role.SHARED_HEADS, segments=_segments(config, ("keys",)))
        fused = family.fused.get(starred, ())
        if role is Role.FUSED:
            # each feature may go to another rank
            table[name] = Part(role, segments=_segments(config, fused))
        if role in (Role.COLUMN, Role.FUSED):
            believed = (heads // tp, max(1, kv_heads // tp)) if "queries" in fused else None
            table[parent] = Part(Role.REGION, heads=believed)
    _check_roles(config, modules, table)
    names = {id(module): name for name, module in modules.items()}
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    table[names[id(embedding)]] = Part(
        Role.EMBEDDING, scales=tuple(name for name in family.scales if hasattr(embedding, name))
    )
    table[names[id(head)]] = _head(config, family)
    return table


def _check_roles(config: Any, modules: dict[str, Any], table: dict[str, Part]) -> None:
    """Raises ConfigError for a parameter within a region that no role covers: each rank's gradient
    of it would be a part of a sum that nobody forms.
    """
    for region, part in table.items():
        if part.role is not Role.REGION:
            continue
        for name, module in modules[region].named_modules(prefix=region):
            own = [key for key, _ in module.named_parameters(recurse=False)]
            if own and (name == region or name not in table):
                what = _starred(f"{name}.{own[0]}")
                raise _refused(config, f"no role says how {what} lies over tp")


def is_gradient_summed(name: str, table: dict[str, Part], sequence_parallel: bool) -> bool:
    """Whether each tp rank's gradient of this parameter is one part of a sum over the TP group.

    Under sequence parallelism every replicated parameter has seen this rank's part of the sequence
    only; without, only those applied to this rank's heads have seen a part.
    """
    module, _, key = name.rpartition(".")
    part = table.get(module)
    if split_dim(part, key) is not None or _is_replicated(name, table):
        return False
    return sequence_parallel or (
        part is not None and part.role in (Role.PER_HEAD, Role.SHARED_HEADS)
    )


def _is_replicated(name: str, table: dict[str, Part]) -> bool:
    """Whether a parameter, or a module, lies within one that every rank computes whole."""
    while name:
        if name in table and table[name].role is Role.REPLICATED:
            return True
        name = name.rpartition(".")[0]
    return False


def _plan(config: Any, family: Family) -> dict[str, Role]:
    """Roles by starred module name, within the layers: transformers', under the record's."""
    theirs = config.base_model_tp_plan or {}
    ours = {**dict.fromkeys(family.fused, Role.FUSED), **family.roles}
    whole = tuple(f"{name}." for name, role in ours.items() if role is Role.REPLICATED)
    # some releases list the embedding too
    left = {
        key: str(style)
        for key, style in theirs.items()
        if key.startswith("layers.") and key not in ours and not key.startswith(whole)
    }
    if not left and not ours:
        raise _refused(config, "transformers has no tensor-parallel plan for this family")
    if unknown := sorted(set(left.values()) - set(PLAN)):
        why = f"its tensor-parallel plan uses {', '.join(unknown)}, which is not supported"
        raise _refused(config, why)
    return {name: PLAN[style] for name, style in left.items()} | ours


def _segments(config: Any, projections: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """(features, heads) of each of a linear's projections; of the MLP's, each feature is a head."""
    heads, kv_heads = config.num_attention_heads, _key_value_heads(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {
        "queries": (heads * head_dim, heads),
        "keys": (kv_heads * head_dim, kv_heads),
        "inner": (config.intermediate_size, config.intermediate_size),
    }
    return tuple(sizes[each] for each in projections)


def _head(config: Any, family: Family) -> Part:
    def value(field: str | None) -> float | None:
        return getattr(config, field) if field else None

    scale = (value(family.logit_factor) or 1.0) / (value(family.logit_divisor) or 1.0)
    return Part(Role.HEAD, scale=scale, softcap=value(family.logit_softcap))


def _key_value_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _undivided(config: Any, tp: int) -> ConfigError:
    kv_heads = config.num_key_value_heads
    common = math.gcd(config.num_attention_heads, config.intermediate_size, kv_heads)
    degrees = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
    return ConfigError(
        "parallelism.tp",
        tp,
        f"must divide the model's {kv_heads} key/value heads, which one norm of {config.model_type}"
        f" spans; degrees that do: {degrees}",
    )


def _refused(config: Any, why: str) -> ConfigError:
    return ConfigError("model.architecture.model_type", config.model_type, why)


def _starred(name: str) -> str:
    """layers.3.mlp.up_proj -> layers.*.mlp.up_proj, as transformers' plans have it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
