"""Qwen3.5 (layers of gated delta nets) and LFM2 (of short convolutions): each rank computes those
layers' mixers whole, for all heads; the rest is split.

Their state runs through a whole row, so the documents of a row can't be kept apart.
"""

from __future__ import annotations

from tp_trainer.models.families.family import Family
from tp_trainer.parallel.tensor import Role

DELTA_NET = frozenset(
    {
        "linear_conv_kernel_dim",
        "linear_key_head_dim",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_value_head_dim",
    }
)

CONVOLUTION = {"causal_conv1d": "causal-conv1d"}

QWEN3_5_TEXT = Family(
    "qwen3_5_text",
    roles={"layers.*.linear_attn": Role.REPLICATED},
    layer_types=("full_attention", "linear_attention"),
    passes_documents=False,
    kernels={"fla": "flash-linear-attention", **CONVOLUTION},
    honoured=DELTA_NET,
)
LFM2 = Family(
    "lfm2",
    roles={
        "layers.*.conv": Role.REPLICATED,
        "layers.*.self_attn.q_proj": Role.COLUMN,
        "layers.*.self_attn.k_proj": Role.COLUMN,
        "layers.*.self_attn.v_proj": Role.COLUMN,
        "layers.*.self_attn.q_layernorm": Role.PER_HEAD,
        "layers.*.self_attn.k_layernorm": Role.PER_HEAD,
        "layers.*.self_attn.out_proj": Role.ROW,
        "layers.*.feed_forward.w1": Role.COLUMN,
        "layers.*.feed_forward.w3": Role.COLUMN,
        "layers.*.feed_forward.w2": Role.ROW,
    },
    layer_types=("full_attention", "conv"),
    passes_documents=False,
    kernels=CONVOLUTION,
    honoured=frozenset(
        {
            "block_auto_adjust_ff_dim",
            "block_ffn_dim_multiplier",
            "block_multiple_of",
            "conv_L_cache",
            "conv_bias",
            "norm_eps",
        }
    ),
)
