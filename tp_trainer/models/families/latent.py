"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): queries, keys and values come from
small latents, which every rank forms for its own heads.
"""

from __future__ import annotations

from tp_trainer.models.families.family import Family
from tp_trainer.models.families.gemma import SCALES
from tp_trainer.parallel.tensor import Role

ROLES = {
    "layers.*.self_attn.q_proj": Role.COLUMN,  # without a latent
    "layers.*.self_attn.q_a_proj": Role.PER_HEAD,
    "layers.*.self_attn.q_a_layernorm": Role.PER_HEAD,
    "layers.*.self_attn.q_b_proj": Role.COLUMN,
    "layers.*.self_attn.kv_a_proj_with_mqa": Role.PER_HEAD,
    "layers.*.self_attn.kv_a_layernorm": Role.PER_HEAD,
    "layers.*.self_attn.kv_b_proj": Role.COLUMN,
    "layers.*.self_attn.o_proj": Role.ROW,
}
SIZES = frozenset(
    {"kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
)

MINICPM3 = Family(
    "minicpm3",
    roles=ROLES,
    logit_divisor="logits_scaling",  # which its config makes of dim_model_base
    scales=SCALES,
    honoured=SIZES | {"dim_model_base", "scale_depth", "scale_emb"},
)
YOUTU = Family("youtu", roles=ROLES, honoured=SIZES | {"rope_interleave"})
