"""Gemma, Gemma 2, VaultGemma, Gemma 3 (its text model): the embedding is scaled; some squash logits
and attention's scores.
"""

from __future__ import annotations

from tp_trainer.models.families.family import Family

SCALES = {"embed_scale": "scalar_embed_scale"}

GEMMA = Family("gemma", scales=SCALES)
GEMMA2 = Family(
    "gemma2",
    logit_softcap="final_logit_softcapping",
    scales=SCALES,
    honoured=frozenset({"attn_logit_softcapping", "query_pre_attn_scalar"}),
)
# its attention has a field attn_logit_softcapping, and passes it to nothing
GEMMA3_TEXT = Family(
    "gemma3_text",
    logit_softcap="final_logit_softcapping",
    scales=SCALES,
    honoured=frozenset({"query_pre_attn_scalar"}),
)
VAULTGEMMA = Family(
    "vaultgemma",
    logit_softcap="final_logit_softcapping",
    scales=SCALES,
    honoured=frozenset({"attn_logit_softcapping", "query_pre_attn_scalar"}),
)
