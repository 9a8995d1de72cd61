"""Granite and HyperCLOVA X: multipliers of embedding, attention's scores, residual branches and
logits.
"""

from __future__ import annotations

from tp_trainer.models.families.family import Family

MULTIPLIERS = frozenset({"attention_multiplier", "embedding_multiplier", "residual_multiplier"})

GRANITE = Family("granite", logit_divisor="logits_scaling", honoured=MULTIPLIERS)
# of the same name, and a factor here
HYPERCLOVAX = Family(
    "hyperclovax", logit_factor="logits_scaling", honoured=MULTIPLIERS | {"use_post_norm"}
)
