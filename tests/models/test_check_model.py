"""What a model may not say: refused by the driver, by name, before any worker is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tp_trainer.config import ConfigError, load
from tp_trainer.models.description import check_model

QWEN2: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
GEMMA3: dict[str, Any] = {**QWEN2, "model_type": "gemma3_text", "head_dim": 8}


def checked(model: dict[str, Any], **parallelism: Any) -> dict[str, Any]:
    """The architecture of a model that is let in."""
    tp = {"tp": 1, "dp": 1}
    config = load({"model": model, "data": {"seq_length": 64}, "parallelism": tp | parallelism})
    check_model(config)
    return config.model.architecture


def directory(path: Path, **fields: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(fields))
    return str(path)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": (
        {"num_hidden_layer": 2},
        "num_hidden_layer: qwen2 has no such field; did you mean num_hidden_layers?",
    ),
    "another family's": ({"final_logit_softcapping": 30.0}, "qwen2 has no such field"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0, must be at least 1"),
    "negative": ({"intermediate_size": -4}, "intermediate_size is -4, must be at least 1"),
    "a fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5, not a whole number"),
    "text": ({"hidden_size": "64"}, "hidden_size is '64', not a whole number"),
    "true": ({"num_attention_heads": True}, "num_attention_heads is True, not a whole number"),
    "heads and width": (
        {"hidden_size": 60, "num_key_value_heads": 8},
        "num_attention_heads=8: must divide hidden_size=60",
    ),
    "heads and groups": (
        {"num_key_value_heads": 3},
        "num_key_value_heads is 3, must divide num_attention_heads=8",
    ),
    "odd heads": ({"hidden_size": 72}, "num_attention_heads=8: makes heads of width 9; rotary"),
    "type": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "type of a number": ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    "negative epsilon": ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
    "dropout": ({"attention_dropout": 1.5}, "attention_dropout is 1.5"),
    "initializer": ({"initializer_range": -0.1}, "initializer_range is -0.1"),
    "activation": (
        {"hidden_act": "sillu"},
        "hidden_act=sillu: transformers has no such activation; did you mean silu?",
    ),
    "padding": (
        {"pad_token_id": 512},
        "pad_token_id is 512, but the vocabulary has only 512 entries",
    ),
    "layer types": ({"layer_types": ["full_attention"]}, "layer_types"),
    "kind of rope": ({"rope_scaling": {"rope_type": "yarm", "factor": 2.0}}, "yarm"),
    "field of rope": ({"rope_parameters": {"rope_type": "linear", "factr": 2.0}}, "factr"),
    "factor of no kind": ({"rope_parameters": {"factor": 2.0}}, "factor"),
    "small factor": ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
    "theta": ({"rope_theta": "many"}, "rope_theta"),
    "contradicting thetas": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}},
        "rope_theta",
    ),
    "dtype": (
        {"dtype": "float16"},
        "dtype=float16: weights are kept in float32; parallelism.param_dtype",
    ),
    "quantised": (
        {"quantization_config": {"quant_method": "fp8"}},
        "quantised weights can't be trained",
    ),
    "family": (
        {"model_type": "gpt3"},
        "gpt3: transformers knows no such model",
    ),
    "several models": (
        {"vision_config": {"depth": 2}, "text_config": {"model_type": "qwen2"}},
        "model_type=qwen2: is made of several models (text_config, vision_config); only a text",
    ),
    "not causal": (
        {"is_causal": False},
        "is_causal=false: is not honoured in training qwen2; model.overrides.is_causal=true trains",
    ),
    "both directions": (
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention=true: is not honoured in training qwen2;",
    ),
    "chunks": (
        {"attention_chunk_size": 128},
        "attention_chunk_size=128: is not honoured in training qwen2; "
        "model.overrides.attention_chunk_size=null trains the model without it",
    ),
    "layers of their own": (
        {"per_layer_config": {"0": {"hidden_act": "gelu"}}},
        "per_layer_config=...: is not honoured in training qwen2;",
    ),
    "tuples": ({"return_dict": False}, "return_dict=false: is not honoured in training qwen2;"),
    "kinds of layers": (
        {"layer_types": ["full_attention", "chunked_attention"]},
        "layer_types=chunked_attention: layers can only be full_attention or sliding_attention",
    ),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("base", ["group", "directory"])
def test_an_override_that_makes_no_sense(kind: str, base: str, tmp_path: Path) -> None:
    overrides, says = BAD[kind]
    chosen: dict[str, Any] = {"architecture": QWEN2, "weights": "random"}
    if base == "directory":
        chosen = {"name": directory(tmp_path / "model", **QWEN2), "weights": "random"}
    checked(chosen)  # it is the override that is refused
    with pytest.raises(ConfigError) as refused:
        checked({**chosen, "overrides": overrides})
    assert says in str(refused.value) and "\n" not in str(refused.value)


# refused where they are typed; in a config transformers lets them through, and they do nothing
# there either
TYPED = {
    "dtype",
    "quantised",
    "field of rope",
    "factor of no kind",
    "small factor",
    "contradicting thetas",
}


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind not in TYPED])
def test_a_group_that_makes_no_sense(kind: str) -> None:
    fields, says = BAD[kind]
    with pytest.raises(ConfigError) as refused:
        checked({"architecture": {**QWEN2, **fields}})
    assert says in str(refused.value)


GOOD: dict[str, dict[str, Any]] = {
    "a null": {"pad_token_id": None},
    "whole float": {"rope_theta": 10000},
    "activation": {"hidden_act": "gelu"},
    "depth": {"num_hidden_layers": 3},
    "heads of their own width": {"head_dim": 16, "hidden_size": 72},
    "unused tokens": {"pad_token_id": -1},
    "causal": {"is_causal": True},
    "one direction": {"use_bidirectional_attention": None},
    "bookkeeping": {"use_cache": False, "output_hidden_states": True, "id2label": {0: "yes"}},
}


@pytest.mark.parametrize("kind", GOOD)
def test_an_override_that_makes_sense(kind: str) -> None:
    base = {**QWEN2, "model_type": "qwen3"} if "head_dim" in GOOD[kind] else QWEN2
    fields = checked({"architecture": base, "overrides": GOOD[kind]})
    for key, value in GOOD[kind].items():
        assert fields.get(key, fields.get("rope_parameters", {}).get(key)) == value


def test_what_a_config_json_alone_says_and_transformers_does_not_know_is_let_through(
    tmp_path: Path,
) -> None:
    """As from_pretrained has it: files carry fields of other programs."""
    checked({"name": directory(tmp_path / "a", **QWEN2, use_magic=True), "weights": "random"})
    with pytest.raises(ConfigError, match="use_magic: qwen2 has no such field"):
        checked({"architecture": {**QWEN2, "use_magic": True}})


SEEN_ELSEWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "not causal": ({"is_causal": False}, "is_causal=false"),
    "both directions": ({"use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
    "sinks": ({"attention_sinks": 4}, "attention_sinks=4"),
    "chunks": ({"attention_chunk_size": 128}, "attention_chunk_size=128"),
    "recomputed": ({"gradient_checkpointing": True}, "gradient_checkpointing=true"),
    "layers of a class without": (
        {"model_type": "llama", "layer_types": ["sliding_attention", "full_attention"]},
        "layer_types=...",
    ),
    "dropout that does nothing": (
        {"model_type": "phi3", "pad_token_id": 0, "embd_pdrop": 0.1},
        "embd_pdrop=0.1",
    ),
    "cap that does nothing": (
        {"model_type": "gemma3_text", "head_dim": 8, "attn_logit_softcapping": 50.0},
        "attn_logit_softcapping=50.0",
    ),
}


@pytest.mark.parametrize("kind", SEEN_ELSEWHERE)
def test_what_a_config_json_says_and_training_does_not_honour(kind: str, tmp_path: Path) -> None:
    fields, says = SEEN_ELSEWHERE[kind]
    name = directory(tmp_path / "model", **{**QWEN2, **fields})
    with pytest.raises(ConfigError) as refused:
        checked({"name": name, "weights": "random"})
    says = f"model.architecture.{says}: is not honoured in training"
    assert says in str(refused.value) and f"(in the config.json of {name})" in str(refused.value)
    hint = re.search(r"model\.overrides\.(\w+)=(\S+) trains the model without", str(refused.value))
    assert hint is not None
    overrides = {hint[1]: json.loads(hint[2])}
    checked({"name": name, "weights": "random", "overrides": overrides})


def test_several_models_in_a_config_json(tmp_path: Path) -> None:
    text = {**QWEN2, "model_type": "gemma3_text", "head_dim": 8}
    name = directory(tmp_path / "a", model_type="gemma3", text_config=text, vision_config={"x": 1})
    assert checked({"name": name, "weights": "random"})["model_type"] == "gemma3_text"
    name = directory(tmp_path / "b", model_type="gemma3", vision_config={"x": 1})
    with pytest.raises(ConfigError, match=r"model_type=gemma3: is made of several models"):
        checked({"name": name, "weights": "random"})


def test_kernels_that_are_not_there_are_told_where_there_are_gpus() -> None:
    architecture = {**QWEN2, "model_type": "qwen3_5_text", "head_dim": 8, "linear_num_key_heads": 2}
    config = load({"model": {"architecture": architecture}, "data": {"seq_length": 64}})
    said = check_model(config)
    assert said is not None and "flash-linear-attention and causal-conv1d not found here" in said
    config.cluster.device = "cpu"
    assert check_model(config) is None


def test_a_padding_id_that_the_class_brings_along(tmp_path: Path) -> None:
    name = directory(tmp_path / "a", **{**QWEN2, "model_type": "phi3"})
    says = r"model.architecture.pad_token_id=32000: phi3's own, .* has only 512 entries; give"
    with pytest.raises(ConfigError, match=says):
        checked({"name": name, "weights": "random"})
    checked({"name": name, "weights": "random", "overrides": {"pad_token_id": None}})


def test_degrees_that_do_not_divide() -> None:
    """Key/value heads are replicated, but not where one norm spans the keys of all heads."""
    checked({"architecture": QWEN2}, tp=8)
    with pytest.raises(ConfigError, match=r"parallelism.tp=3: must divide the model's 8 heads"):
        checked({"architecture": QWEN2}, tp=3)
    olmo2 = {**QWEN2, "model_type": "olmo2"}
    checked({"architecture": olmo2}, tp=4)
    says = r"parallelism.tp=8: must divide the model's 4 key/value heads.* that do: 1, 2, 4$"
    with pytest.raises(ConfigError, match=says):
        checked({"architecture": olmo2}, tp=8)


def test_a_shard_that_is_absent(tmp_path: Path) -> None:
    name = directory(tmp_path / "a", **QWEN2)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "a" / "model-2.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model.name=.*: model-1.safetensors is not there, one"):
        checked({"name": name, "weights": "pretrained"})


def test_quantised_weights_of_a_hub_id() -> None:
    """Its files are none of the driver's; its config is."""
    fields = {**QWEN2, "_name_or_path": "a/b", "quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(ConfigError, match=r"model.name=a/b: has quantised weights .*gptq"):
        checked({"name": "a/b", "architecture": fields, "weights": "pretrained"})


def test_what_a_config_json_leaves_to_its_family_is_filled_in(tmp_path: Path) -> None:
    fields = {
        key: value
        for key, value in GEMMA3.items()
        if key not in ("head_dim", "tie_word_embeddings")
    }
    found = checked({"name": directory(tmp_path / "a", **fields), "weights": "random"})
    assert (found["head_dim"], found["tie_word_embeddings"]) == (256, True)
    del fields["num_key_value_heads"]
    found = checked({"name": directory(tmp_path / "a", **fields), "weights": "random"})
    assert found["num_key_value_heads"] == 4  # gemma3's own default, not as many as heads


def test_an_architecture_beside_a_name_must_be_that_of_the_name(tmp_path: Path) -> None:
    name = directory(tmp_path / "a", **QWEN2)
    checked({"name": name, "architecture": QWEN2, "weights": "random"})
    with pytest.raises(
        ConfigError,
        match=r"model.architecture.hidden_size=32: .* says 64; .*model.overrides.hidden_size",
    ):
        checked({"name": name, "architecture": {**QWEN2, "hidden_size": 32}, "weights": "random"})
    with pytest.raises(ConfigError, match=r"model.architecture.head_dim=8: .* says nothing"):
        checked({"name": name, "architecture": {**QWEN2, "head_dim": 8}, "weights": "random"})


def test_a_model_class_of_its_own_is_refused(tmp_path: Path) -> None:
    own = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    name = directory(tmp_path / "a", **QWEN2, **own)
    # transformers' class of that model_type, as from_pretrained has it
    checked({"name": name, "weights": "random"})
    with pytest.raises(
        ConfigError, match=r"model.trust_remote_code=true: .*model.overrides.auto_map=null"
    ):
        checked({"name": name, "weights": "random", "trust_remote_code": True})
    checked(
        {
            "name": name,
            "weights": "random",
            "trust_remote_code": True,
            "overrides": {"auto_map": None},
        }
    )


def test_a_name_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    for name, says in (
        ("x.gguf", "GGUF weights (x.gguf), which are not read; convert them once: python -c "),
        ("broken", "its config.json can't be read ("),
        ("list", "its config.json holds no keys and values"),
        ("nowhere", "no such directory, and not a hub id"),
    ):
        with pytest.raises(ConfigError) as refused:
            checked({"name": str(tmp_path / name)})
        assert says in str(refused.value)


def test_revisions_are_of_hub_ids(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.revision=main: only a hub id has revisions"):
        checked(
            {"name": directory(tmp_path / "a", **QWEN2), "weights": "random", "revision": "main"}
        )


@pytest.mark.parametrize("key", ["param_dtype", "reduce_dtype"])
def test_float16_without_loss_scaling(key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"parallelism.{key}=float16: .*no loss scaling: give bfloat16"
    ):
        checked({"architecture": QWEN2}, **{key: "float16"})
