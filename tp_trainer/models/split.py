"""The split table: what each module of a model is to tensor parallelism, and so how each parameter lies over tp.

Derived from the plan that transformers keeps beside each family (`base_model_tp_plan`), completed for what that plan
leaves out: token embedding, head, the regions between them, and which replicated gradients are parts of a sum.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from tp_trainer.config import ConfigError
from tp_trainer.parallel.tensor import Part, Role, split_dim

PLAN = {"colwise": Role.COLUMN, "rowwise": Role.ROW, "replicated_with_grad_allreduce": Role.PER_HEAD}

# Where transformers' plan computes more than its part on every rank, or leaves something out: styles by module name.
OWN: dict[str, dict[str, Role]] = {
    "phi3": {
        "layers.*.self_attn.qkv_proj": Role.FUSED, "layers.*.self_attn.o_proj": Role.ROW,
        "layers.*.mlp.gate_up_proj": Role.FUSED, "layers.*.mlp.down_proj": Role.ROW,
    },
    "glm4": {"layers.*.mlp.gate_up_proj": Role.FUSED, "layers.*.mlp.down_proj": Role.ROW},
    "olmo2": {
        "layers.*.self_attn.q_proj": Role.COLUMN, "layers.*.self_attn.k_proj": Role.COLUMN, "layers.*.self_attn.v_proj": Role.COLUMN,
        "layers.*.self_attn.o_proj": Role.ROW, "layers.*.self_attn.q_norm": Role.NORM, "layers.*.self_attn.k_norm": Role.NORM,
    },
}  # fmt: skip


def split_table(model: PreTrainedModel, tp: int) -> dict[str, Part]:
    """Full module name -> its part, for every module that has one, at tensor-parallel degree `tp`.

    Raises:
        ConfigError: the family has no plan, or one that the table can't serve.
    """
    config, family = model.config, model.config.model_type

    def refuse(why: str) -> ConfigError:
        return ConfigError("model.architecture.model_type", family, why)

    plan: dict[str, Any] = {**(config.base_model_tp_plan or {}), **OWN.get(family, {})}
    plan = {name: style for name, style in plan.items() if name.startswith("layers.")}  # some releases list the embedding too
    if not plan:
        raise refuse("transformers has no tensor-parallel plan for this family")
    unknown = sorted({str(style) for style in plan.values() if not isinstance(style, Role)} - set(PLAN))
    if unknown:
        raise refuse(f"its tensor-parallel plan uses {', '.join(unknown)}, which is not supported")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    queries, keys = (heads * head_dim, heads), (kv_heads * head_dim, kv_heads)
    modules = dict(model.named_modules())
    prefix = model.base_model_prefix + "."
    table: dict[str, Part] = {}
    for name in modules:
        style = plan.get(_starred(name.removeprefix(prefix)))
        if style is None:
            continue
        role, (parent, _, last) = style if isinstance(style, Role) else PLAN[style], name.rpartition(".")
        table[name] = Part(role)
        if role is Role.COLUMN and last in ("k_proj", "v_proj") and kv_heads % tp:
            if f"{parent}.k_norm" in table or plan.get(f"{_starred(parent.removeprefix(prefix))}.k_norm") is Role.NORM:
                raise refuse(f"its key norm spans {kv_heads} heads, which parallelism.tp={tp} doesn't divide")
            table[name] = Part(Role.SHARED_HEADS, segments=(keys,))
        if role is Role.FUSED:
            inner = (config.intermediate_size, config.intermediate_size)  # each feature may go to another rank
            table[name] = Part(role, segments=(queries, keys, keys) if last == "qkv_proj" else (inner, inner))
        if role in (Role.COLUMN, Role.FUSED):
            believed = (heads // tp, max(1, kv_heads // tp)) if last == "qkv_proj" else None
            table[parent] = Part(Role.REGION, heads=believed)
    names = {id(module): name for name, module in modules.items()}
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise refuse("its output projection has a bias, which is not supported")
    table[names[id(model.get_input_embeddings())]] = Part(Role.EMBEDDING)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)  # Cohere's, Granite's
    table[names[id(head)]] = Part(Role.HEAD, scale=scale, softcap=getattr(config, "final_logit_softcapping", None))
    return table


def is_gradient_summed(name: str, table: dict[str, Part], sequence_parallel: bool) -> bool:
    """Whether each tp rank's gradient of this parameter is one part of a sum over the TP group.

    Under sequence parallelism every replicated parameter has seen this rank's part of the sequence only; without, only
    those applied to this rank's heads have seen a part.
    """
    module, _, key = name.rpartition(".")
    part = table.get(module)
    if split_dim(part, key) is not None:
        return False
    return sequence_parallel or (part is not None and part.role in (Role.PER_HEAD, Role.SHARED_HEADS))


def _starred(name: str) -> str:
    """layers.3.mlp.up_proj -> layers.*.mlp.up_proj, as transformers' plans have it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
