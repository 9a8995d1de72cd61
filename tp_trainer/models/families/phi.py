"""Phi: layer norms, biases everywhere. Phi-3: queries, keys and values in one linear, gate and up
projection in another.
"""

from __future__ import annotations

from tp_trainer.models.families.family import Family
from tp_trainer.parallel.tensor import Role

# embd_pdrop is a field of its config that its forward doesn't read
PHI3 = Family(
    "phi3",
    roles={"layers.*.self_attn.o_proj": Role.ROW, "layers.*.mlp.down_proj": Role.ROW},
    fused={
        "layers.*.self_attn.qkv_proj": ("queries", "keys", "keys"),
        "layers.*.mlp.gate_up_proj": ("inner", "inner"),
    },
    honoured=frozenset({"original_max_position_embeddings", "resid_pdrop"}),
)
PHI = Family(
    "phi",
    roles={
        "layers.*.self_attn.q_layernorm": Role.PER_HEAD,
        "layers.*.self_attn.k_layernorm": Role.PER_HEAD,
    },
    honoured=frozenset({"layer_norm_eps", "qk_layernorm", "resid_pdrop", "embd_pdrop"}),
)
