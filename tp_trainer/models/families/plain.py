"""Families of which transformers' plan says all but a few fields that their forward reads."""

from __future__ import annotations

from tp_trainer.models.families.family import Family
from tp_trainer.parallel.tensor import Role

# its activation has parameters, one for all features
APERTUS = Family("apertus", roles={"layers.*.mlp.act_fn": Role.PER_HEAD})
APERTUS1P5 = Family("apertus1p5_text", roles=APERTUS.roles)
ERNIE4_5 = Family("ernie4_5", honoured=frozenset({"use_bias"}))
EXAONE = Family(
    "exaone",
    stored={
        "transformer.wte.": "model.embed_tokens.",
        "transformer.h.": "model.layers.",
        "transformer.ln_f.": "model.norm.",
        ".attn.attention.": ".self_attn.",
        ".self_attn.out_proj.": ".self_attn.o_proj.",
        ".ln_1.": ".input_layernorm.",
        ".ln_2.": ".post_attention_layernorm.",
        ".mlp.c_fc_0.": ".mlp.gate_proj.",
        ".mlp.c_fc_1.": ".mlp.up_proj.",
        ".mlp.c_proj.": ".mlp.down_proj.",
    },
)
# a config class makes layer_types of it
EXAONE4 = Family("exaone4", honoured=frozenset({"sliding_window_pattern"}))
# queries, keys and values of a head lie together in its linear, so its rows are split as they are;
# the dropout of its classifier is none of a language model's
GPT_NEOX = Family(
    "gpt_neox",
    stored={"embed_out.": "lm_head."},
    honoured=frozenset(
        {"classifier_dropout", "hidden_dropout", "layer_norm_eps", "use_parallel_residual"}
    ),
)
# transformers' plan knows its embedding alone
HUNYUAN_V1_DENSE = Family(
    "hunyuan_v1_dense",
    roles={
        "layers.*.self_attn.q_proj": Role.COLUMN,
        "layers.*.self_attn.k_proj": Role.COLUMN,
        "layers.*.self_attn.v_proj": Role.COLUMN,
        "layers.*.self_attn.o_proj": Role.ROW,
        "layers.*.self_attn.query_layernorm": Role.PER_HEAD,
        "layers.*.self_attn.key_layernorm": Role.PER_HEAD,
        "layers.*.mlp.gate_proj": Role.COLUMN,
        "layers.*.mlp.up_proj": Role.COLUMN,
        "layers.*.mlp.down_proj": Role.ROW,
    },
)
JAIS2 = Family("jais2", honoured=frozenset({"layer_norm_eps"}))
NANOCHAT = Family("nanochat", logit_softcap="final_logit_softcapping")
NEMOTRON = Family("nemotron", passes_documents=False, honoured=frozenset({"norm_eps"}))
# its residual_dropout is a function's, not a module's: ranks would draw different masks
SEED_OSS = Family("seed_oss", honoured=frozenset({"attention_out_bias"}))
STARCODER2 = Family("starcoder2", honoured=frozenset({"norm_epsilon", "use_bias"}))
