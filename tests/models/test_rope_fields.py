"""Rope fields in both forms, over configs of both forms: the angles are those of plain transformers
given the old form.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tp_trainer.config import ConfigError
from tp_trainer.config.fields import with_overrides
from tp_trainer.models.description import meta_model

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [1.5] * 8,
        "original_max_position_embeddings": 64,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
THETA, OTHER = 300.0, 50.0


def angles(fields: dict[str, Any]) -> torch.Tensor:
    """What rotary embeddings of these fields give for positions beyond the original length,
    float32.
    """
    config = AutoConfig.for_model("llama", **SIZES, **fields)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 200, 32), torch.arange(200)[None])
    return torch.stack([cos, sin])


def scaling(kind: str, key: str = "rope_type") -> dict[str, Any] | None:
    return None if kind == "default" else {key: kind, **KINDS[kind]}


def ours(fields: dict[str, Any], overrides: dict[str, Any]) -> torch.Tensor:
    made = with_overrides({"model_type": "llama", **SIZES, **fields}, overrides)
    return angles({key: value for key, value in made.items() if key not in ("model_type", *SIZES)})


def test_every_kind_that_transformers_knows_is_here() -> None:
    assert set(KINDS) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("kind", KINDS)
def test_all_forms_over_all_forms(kind: str) -> None:
    expected = angles({"rope_theta": THETA, "rope_scaling": scaling(kind)})
    new = {"rope_type": kind, **KINDS[kind]}
    bases: list[dict[str, Any]] = [
        {},
        {"rope_theta": OTHER},
        {"rope_theta": OTHER, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": OTHER}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": OTHER, "factor": 3.0}},
        {"rope_parameters": {"rope_theta": OTHER, "rope_type": "default"}, "rope_theta": 7.0},
    ]
    typed: list[dict[str, Any]] = [
        {"rope_theta": THETA, "rope_scaling": scaling(kind)},
        {"rope_theta": THETA, "rope_scaling": scaling(kind, "type")},
        {"rope_parameters": {**new, "rope_theta": THETA}},
        {"rope_parameters": new, "rope_theta": THETA},
    ]
    for base in bases:
        for overrides in typed:
            assert torch.equal(ours(base, overrides), expected), (base, overrides)
    for base in (
        {"rope_theta": OTHER, "rope_scaling": scaling(kind)},
        {"rope_parameters": {**new, "rope_theta": OTHER}},
    ):
        assert torch.equal(ours(base, {"rope_theta": THETA}), expected), base
        assert torch.equal(ours(base, {"rope_parameters": {"rope_theta": THETA}}), expected), base
        twice = with_overrides(with_overrides(base, {"rope_theta": THETA}), {"rope_theta": THETA})
        assert torch.equal(angles(twice), expected), "a config that is loaded again"
    plain = angles({"rope_theta": OTHER, "rope_scaling": scaling(kind)})
    assert not torch.equal(plain, expected)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_single_value_changes_alone(kind: str) -> None:
    expected = angles(
        {"rope_theta": THETA, "rope_scaling": {**(scaling(kind) or {}), "factor": 6.0}}
    )
    for base in (
        {"rope_theta": THETA, "rope_scaling": scaling(kind, "type")},
        {"rope_parameters": {"rope_type": kind, **KINDS[kind], "rope_theta": THETA}},
    ):
        for key in ("rope_scaling", "rope_parameters"):
            assert torch.equal(ours(base, {key: {"factor": 6.0}}), expected), (base, key)


GEMMA3 = {
    "model_type": "gemma3_text",
    **SIZES,
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}


@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_theta": THETA},
        {"rope_local_base_freq": OTHER},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_theta": THETA,
            "rope_local_base_freq": OTHER,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ],
)
def test_ropes_by_layer_type(overrides: dict[str, Any]) -> None:
    old = {"rope_theta": 1000.0, "rope_local_base_freq": 100.0}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
    }

    def each(fields: dict[str, Any]) -> list[torch.Tensor]:
        rotary = Gemma3RotaryEmbedding(AutoConfig.for_model(**fields))
        x, positions = torch.zeros(1, 50, 32), torch.arange(50)[None]
        return [torch.stack(rotary(x, positions, layer)) for layer in GEMMA3["layer_types"]]

    expected = each({**GEMMA3, **old, **overrides})
    for base in (old, new):
        assert all(
            map(torch.equal, each(with_overrides({**GEMMA3, **base}, overrides)), expected)
        ), base


@pytest.mark.parametrize(
    ("fields", "overrides", "says"),
    [
        (
            {},
            {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 6.0}},
            "rope_theta is 6.0 there and 5.0",
        ),
        (
            {},
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0},
            },
            "rope_type is dynamic there and linear",
        ),
        ({}, {"rope_local_base_freq": 5.0}, "the same in all layers"),
        ({}, {"rope_scaling": 4.0}, "must be keys and values"),
        (
            {"rope_local_base_freq": 5.0},
            {"rope_parameters": {"rope_type": "default"}},
            "by layer type",
        ),
    ],
)
def test_contradictions(fields: dict[str, Any], overrides: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_overrides(fields, overrides)


def test_fields_are_left_as_they_were() -> None:
    """transformers fills in the dictionaries that it is given."""
    rope = {"rope_type": "default"}
    meta_model({"model_type": "llama", **SIZES, "rope_parameters": rope})
    assert rope == {"rope_type": "default"}
