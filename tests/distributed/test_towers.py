"""Multimodal checkpoints: their text part is trained and exported as a text model, whose logits are
those of the whole model on text alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_reference import settings_of
from rank_pool import RankPool
from safetensors.torch import load_file
from test_weight_files import FIELDS, Tensors, assert_close, exported, logits, rewrite
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tp_trainer.config import ConfigError, load
from tp_trainer.config.towers import TEXT_TYPES, THETA, WRAPPERS
from tp_trainer.models.description import check_model
from tp_trainer.models.families import HARMLESS

TEXT: dict[str, Any] = {**FIELDS, "head_dim": 8}
MROPE = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 1, 1]}
VISION: dict[str, dict[str, Any]] = {
    "siglip": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    "qwen": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2},
}
VISION["pixtral"] = {**VISION["siglip"], "model_type": "pixtral", "head_dim": 8}
TOKENS = {"image_token_id": 90, "video_token_id": 91}
WINDOWS = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
# wrapper, its text part's fields, its vision part's, the type that is trained
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "gemma3": (
        {"model_type": "gemma3", "mm_tokens_per_image": 4, "image_token_index": 90},
        {**TEXT, "model_type": "gemma3_text", **WINDOWS, "pad_token_id": 0},
        VISION["siglip"],
        "gemma3_text",
    ),
    "mistral3": (
        {"model_type": "mistral3", "image_token_index": 90, "tie_word_embeddings": False},
        {**TEXT, "model_type": "mistral"},
        VISION["pixtral"],
        "mistral",
    ),
    "mistral3_ministral3": (
        {"model_type": "mistral3", "image_token_index": 90, "tie_word_embeddings": True},
        {**TEXT, "model_type": "ministral3", "tie_word_embeddings": True, "pad_token_id": 0},
        VISION["pixtral"],
        "ministral3",
    ),
    "qwen2_vl": (
        {"model_type": "qwen2_vl", **TOKENS},
        {**FIELDS, "model_type": "qwen2_vl_text", "rope_parameters": MROPE},
        {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1},
        "qwen2",
    ),
    "qwen2_5_vl": (
        {"model_type": "qwen2_5_vl", **TOKENS, "tie_word_embeddings": True},
        {**FIELDS, "model_type": "qwen2_5_vl_text", "rope_parameters": MROPE},
        {**VISION["qwen"], "out_hidden_size": 32, "fullatt_block_indexes": [0]},
        "qwen2",
    ),
    "qwen3_5": (
        {"model_type": "qwen3_5", **TOKENS},
        {
            **TEXT,
            "model_type": "qwen3_5_text",
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {
                **MROPE,
                "partial_rotary_factor": 0.75,
                "mrope_section": [1, 1, 1],
                "mrope_interleaved": True,
            },
        },
        {**VISION["qwen"], "out_hidden_size": 32},
        "qwen3_5_text",
    ),
    "qwen3_vl": (
        {"model_type": "qwen3_vl", **TOKENS},
        {
            **TEXT,
            "model_type": "qwen3_vl_text",
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
        },
        {**VISION["qwen"], "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        "qwen3",
    ),
}


def wrapper(path: Path, kind: str) -> Path:
    """A directory with the weights of a whole multimodal model."""
    outer, text, vision, _ = KINDS[kind]
    config = AutoConfig.for_model(**outer, text_config=text, vision_config=vision)
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "language_model" in name:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(path)
    return path


def whole_logits(directory: Path) -> torch.Tensor:
    """The whole model's, of the text that `logits` shows a text model."""
    model = AutoModelForImageTextToText.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.randint(
        0, FIELDS["vocab_size"] - 6, (2, 60), generator=torch.Generator().manual_seed(3)
    )
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def text_logits(directory: Path) -> torch.Tensor:
    return logits(directory, vocabulary=FIELDS["vocab_size"] - 6)


def names_within(tensors: Tensors) -> Tensors:
    """transformers 5's own names, which a file may have too."""

    if not any("language_model." in name for name in tensors):  # Qwen's: model.* and visual.*
        return {
            name.replace("model.", "model.language_model.", 1)
            if name.startswith("model.")
            else f"model.{name}".replace("model.lm_head.", "lm_head."): tensor
            for name, tensor in tensors.items()
        }

    def within(name: str) -> str:
        name = name.replace("language_model.model.", "model.language_model.")
        return name.replace("language_model.lm_head.", "lm_head.")

    return {within(name): tensor for name, tensor in tensors.items()}


def names_before(tensors: Tensors) -> Tensors:
    """Gemma 3's and Mistral's names on the hub; Qwen's there are as transformers saves them."""
    if not any("model.language_model." in name for name in tensors):
        return tensors

    def before(name: str) -> str:
        name = name.replace("model.language_model.", "language_model.model.")
        return f"language_model.{name}" if name.startswith("lm_head.") else name

    return {before(name): tensor for name, tensor in tensors.items()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("names", [names_within, names_before])
@pytest.mark.parametrize("kind", KINDS)
def test_the_text_part_is_the_whole_model_on_text(
    ranks: RankPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    names: Callable[[Tensors], Tensors],
) -> None:
    source = wrapper(tmp_path / "model", kind)
    expected = whole_logits(source)
    says, out = exported(ranks, rewrite(source, names), tmp_path, monkeypatch)
    assert json.loads((out / "config.json").read_text())["model_type"] == KINDS[kind][3]
    assert_close(text_logits(out), expected)
    tied = KINDS[kind][0].get("tie_word_embeddings", kind == "gemma3")
    assert ("head tied" in says) is tied
    names_out = load_file(next(out.glob("*.safetensors"))).keys()
    assert not [name for name in names_out if "vision" in name or "visual" in name]


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_qwens_text_part_beside_the_others(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The hub's config.json is flat, and names its rope mrope; its tensors are model.* and
    visual.*."""
    source = wrapper(tmp_path / "model", kind)
    expected = whole_logits(source)
    content = json.loads((source / "config.json").read_text())
    text = content.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    content = {**text, **content}
    (source / "config.json").write_text(json.dumps(content))

    def flat(tensors: Tensors) -> Tensors:
        return {
            name.replace("model.visual.", "visual.").replace("language_model.", ""): tensor
            for name, tensor in tensors.items()
        }

    _, out = exported(ranks, rewrite(source, flat), tmp_path, monkeypatch)
    assert_close(text_logits(out), expected)


def test_what_is_left_out_is_said_and_what_is_amiss_is_refused(tmp_path: Path) -> None:
    source = wrapper(tmp_path / "model", "gemma3")
    config = load(settings_of(str(source)))
    said = check_model(config)
    assert said is not None and f"the text part of {source}, a gemma3, is trained" in said
    rewrite(
        source,
        lambda each: {**names_within(each), "model.language_model.layers.7.x": torch.ones(2)},
    )
    assert set(WRAPPERS) == {outer["model_type"] for outer, *_ in KINDS.values()}
    with pytest.raises(ConfigError, match=r"unexpected: model\.language_model\.layers\.7\.x"):
        check_model(load(settings_of(str(source))))


def test_a_mixture_of_experts_within(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama4",
                "text_config": {**TEXT, "model_type": "llama4_text", "num_local_experts": 16},
                "vision_config": {},
            }
        )
    )
    with pytest.raises(ConfigError, match="is a mixture of 16 experts"):
        load(settings_of(str(tmp_path)))


@pytest.mark.parametrize("text_type", TEXT_TYPES)
def test_what_a_silent_config_means(text_type: str) -> None:
    """Where a text part's config says nothing its own class does, not the class that it becomes."""
    becomes, silent = TEXT_TYPES[text_type]
    own: Any = CONFIG_MAPPING[text_type]
    other: Any = CONFIG_MAPPING[becomes]
    theirs = {each.name: each.default for each in dataclasses.fields(other)}
    for each in dataclasses.fields(own):
        if each.name in theirs and each.name not in HARMLESS - {"bos_token_id", "eos_token_id"}:
            expected = each.default
            assert silent.get(each.name, theirs[each.name]) == expected, each.name
    if becomes != text_type:
        assert THETA[becomes] == own.default_theta
