"""The text part of a multimodal checkpoint: its config fields, taken out of the wrapper's
config.json.

Of text alone all axes of a multimodal rope have the same positions, so Qwen's text parts are Qwen2
and Qwen3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PARTS = ("text_config", "vision_config", "audio_config")  # of a config of several models
OUTER = ("quantization_config", "transformers_weights", "auto_map")  # said once, of all parts
# whose text part was held against the whole model on text
WRAPPERS = ("gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
QWEN2_VL: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_window_layers": 80,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
# a text part's type -> the type that it is by itself, and what it means where its config is silent
# and that type's would mean something else (or the driver must know it)
TEXT_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3_text": (
        "gemma3_text",
        {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
        },
    ),
    "qwen2_vl_text": ("qwen2", QWEN2_VL),
    "qwen2_5_vl_text": ("qwen2", QWEN2_VL),
    "qwen3_vl_text": ("qwen3", {"max_position_embeddings": 128000}),
}
THETA = {"qwen2": 1e6, "qwen3": 5e5}  # of the text parts that become these, where none is stated
# wrappers that the hub has with their text part's fields beside the other parts
FLAT = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}


def text_part(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of a multimodal config's text part, as a text model's config.json has them; None
    where the config is no such wrapper's.

    Where either says that the head is tied it is, as in transformers.
    """
    wrapper, text = str(fields.get("model_type")), fields.get("text_config")
    if not isinstance(text, Mapping):
        if wrapper not in FLAT or not isinstance(fields.get("vision_config"), Mapping):
            return None
        text = {key: value for key, value in fields.items() if not _is_of_others(key)}
        text["model_type"] = FLAT[wrapper]
    if not text.get("model_type"):
        return None
    text_type, silent = TEXT_TYPES.get(str(text["model_type"]), (str(text["model_type"]), {}))
    found = {**silent, **{key: value for key, value in text.items() if value is not None}}
    found |= {key: fields[key] for key in OUTER if fields.get(key)}
    tied = [each["tie_word_embeddings"] for each in (fields, text) if "tie_word_embeddings" in each]
    if tied:
        found["tie_word_embeddings"] = any(tied)
    if found["model_type"] != text_type:
        found = _one_axis(found, THETA[text_type])
    return {**found, "model_type": text_type}


def _is_of_others(key: str) -> bool:
    own_tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return key in PARTS or (key.endswith("_token_id") and key not in own_tokens)


def _one_axis(fields: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """Rope as it is where all axes of a multimodal one have the same positions."""
    found = dict(fields)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := found.pop(name, None), Mapping):
            kept = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
            for key in ("type", "rope_type"):
                if kept.get(key) in ("mrope", "default"):
                    del kept[key]
            found.setdefault("rope_theta", kept.pop("rope_theta", None))
            if kept:
                found[name] = kept
    if found.get("rope_theta") is None:
        found["rope_theta"] = theta
    return found
