"""Command R, Command R7B and their kin: layer norms without bias, logits scaled."""

from __future__ import annotations

from tp_trainer.models.families.family import Family

# cohere's use_qk_norm has a weight of its own for each head, which no role splits
COHERE = Family("cohere", logit_factor="logit_scale", honoured=frozenset({"layer_norm_eps"}))
COHERE2 = Family("cohere2", logit_factor="logit_scale", honoured=frozenset({"layer_norm_eps"}))
COHERE_COMPASS_TEXT = Family(
    "cohere_compass_text", logit_factor="logit_scale", honoured=frozenset({"layer_norm_eps"})
)
