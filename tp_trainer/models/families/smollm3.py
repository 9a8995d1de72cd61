"""SmolLM3: layers without rotary embedding."""

from __future__ import annotations

from tp_trainer.models.families.family import Family

SMOLLM3 = Family("smollm3", honoured=frozenset({"no_rope_layer_interval", "no_rope_layers"}))
