"""config: what loads, what is derived, what is refused; the names of runs; saved configs."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from tp_trainer.config import (
    Architecture,
    Config,
    ConfigError,
    check_global_batch,
    check_same_tokens,
    derived_name,
    known_keys,
    load,
    plain,
    to_yaml,
    unknown_key,
)
from tp_trainer.config.identity import choices

NUMBERS: dict[str, Any] = {
    "_name_or_path": "tiny",
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def loaded(**dotted: Any) -> Config:
    """A Config of tiny numbers with keys set as in optim__lr=1."""
    values: dict[str, Any] = {"model": {"architecture": dict(NUMBERS)}}
    for key, value in dotted.items():
        *groups, last = key.split("__")
        node = values
        for group in groups:
            node = node.setdefault(group, {})
        node[last] = value
    return load(values)


def refusal(**dotted: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(**dotted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_plain_loads_to_the_same_config() -> None:
    config = loaded(optim__betas=[0.8, 0.9], cluster__env={"A": "1"})
    assert load(plain(config)) == config
    assert isinstance(config.optim.betas, list) and dataclasses.is_dataclass(config.model.recipe)


def test_to_yaml_loads_to_the_same_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "swordfish")
    words = {"data__source": "jsonl", "data__name": "x.jsonl", "data__text_column": "1e-5"}
    words |= {"checkpoint__storage_path": "s3://a/b"}
    config = loaded(optim__lr=1e-5, cluster__env={"TOKEN": "swordfish"}, **words)
    text = to_yaml(config)
    assert "swordfish" not in text
    values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    assert isinstance(values, dict)
    assert (
        values.pop("defaults")[:2] == ["schema", "_self_"]
        and values.pop("hydra")["output_subdir"] is None
    )
    again = OmegaConf.to_container(OmegaConf.create(values), resolve=True)
    assert isinstance(again, dict)
    assert load({str(key): value for key, value in again.items()}) == config
    # complete
    assert set(yaml.safe_load(text)) == {
        "defaults",
        "hydra",
        *(each.name for each in dataclasses.fields(Config)),
    }


def test_errors_survive_pickling() -> None:
    error = ConfigError("optim.lr", -1.0, "must be at least 0")
    assert (
        str(pickle.loads(pickle.dumps(error))) == str(error) == "optim.lr=-1.0: must be at least 0"
    )


# --------------------------------------------------------------------------------------------------


def test_what_is_null_follows_from_other_keys(tmp_path: Path) -> None:
    config = loaded(parallelism__tp=4, model__recipe={"seq_length": 256, "lr": 0.5})
    assert (
        config.cluster.num_workers,
        config.data.seq_length,
        config.optim.lr,
        config.model.weights,
    ) == (8, 256, 0.5, "random")
    assert loaded(data__seq_length=64, model__recipe={"seq_length": 256}).data.seq_length == 64
    assert loaded().data.seq_length == 1024  # 2048, but the model has no more positions
    assert Path(config.run_dir).is_absolute()


YARN = {"factor": 4.0, "original_max_position_embeddings": 256}
LENGTHS: dict[str, tuple[dict[str, Any], int]] = {  # of 1024 positions, unscaled
    "no rope": ({}, 1024),
    "default": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 1024),
    "yarn": ({"rope_scaling": {"type": "yarn", **YARN, "factor": 8}}, 2048),
    "yarn, scaled already": ({"rope_scaling": {"rope_type": "yarn", **YARN}}, 1024),
    "yarn over all": (
        {"rope_scaling": {"type": "yarn", **YARN, "original_max_position_embeddings": 1024}},
        4096,
    ),
    "yarn, new form": ({"rope_parameters": {"rope_type": "yarn", **YARN, "factor": 8.0}}, 2048),
    "yarn without original": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, 2048),
    "yarn without factor": ({"rope_scaling": {"type": "yarn", "factor": None}}, 1024),
    "yarn, original beside": (
        {"rope_scaling": {"type": "yarn", "factor": 8}, "original_max_position_embeddings": 256},
        2048,
    ),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 2560),
    "linear, new form": ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, 2048),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 2048),
    "llama3": ({"rope_scaling": {"rope_type": "llama3", **YARN, "factor": 32.0}}, 1024),
    "longrope": ({"rope_scaling": {"type": "longrope", **YARN, "factor": 32.0}}, 1024),
    "by layer": (
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", **YARN, "factor": 8.0},
                "sliding_attention": {"rope_type": "default"},
            }
        },
        2048,
    ),
    "by layer, old form": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_local_base_freq": 1e4},
        2048,
    ),
    "not there": ({"rope_parameters": None, "rope_scaling": None}, 1024),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_lengths_go_as_far_as_scaled_positions(case: str, tmp_path: Path) -> None:
    fields, length = LENGTHS[case]
    (tmp_path / "config.json").write_text(json.dumps({**NUMBERS, **fields}))

    def loads(length: int | None) -> Config:
        return loaded(model__name=str(tmp_path), data__seq_length=length)

    assert loads(length).data.seq_length == length
    assert loads(None).data.seq_length == 1024, "the default, and with it the run's name, stays"
    refused = f"data.seq_length={length + 2}: the model has {length} positions; give at most that"
    with pytest.raises(ConfigError, match=refused):
        loads(length + 2)


def test_a_name_alone_replaces_the_groups_architecture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**NUMBERS, "hidden_size": 64}))
    config = loaded(
        model__name=str(tmp_path),
        model__recipe={"lr": 0.5},
        model__overrides={"num_hidden_layers": 2},
    )
    assert (
        config.model.architecture["hidden_size"] == 64
        and config.model.architecture["num_hidden_layers"] == 2
    )
    # the group's recipe is not this model's
    assert config.model.weights == "pretrained" and config.optim.lr == 1e-5
    assert load(plain(config)) == config


NAME = derived_name(loaded())


def test_the_derived_name_is_stable_and_readable() -> None:
    assert loaded().experiment_name == NAME
    assert NAME.startswith("tiny-embedded-tp2_dp2-")
    values = {**plain(loaded()), "experiment_name": None}
    assert load(values).experiment_name == NAME  # what is resolved doesn't change it


@pytest.mark.parametrize(
    "change",
    [
        {"optim__lr": 1e-3},
        {"seed": 1},
        {"data__percentage": 50},
        {"data__seq_length": 128},
        {"parallelism__tp": 1},
        {"parallelism__compile": True},
        {"parallelism__float8": True},
        {"train__micro_batch_size": 2},
        {"train__global_batch_size": 16},
        {"optim__betas": [0.9, 0.99]},
        {"model__overrides": {"num_hidden_layers": 2}},
        {"train__clip_grad_norm": None},
        {"train__deterministic": True},
    ],
    ids=str,
)
def test_the_derived_name_changes_with_what_shapes_the_numbers(change: dict[str, Any]) -> None:
    assert loaded(**change).experiment_name != NAME


def test_the_derived_name_does_not_depend_on_how_a_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "corpus.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "data" / "tokenizer").mkdir()
    model = tmp_path / "data" / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(NUMBERS))

    def names(key: str, path: str) -> set[str]:
        forms = [f"data/{path}", f"./data/{path}", f"{tmp_path}/data/{path}", f"~/data/{path}"]
        forms += [f"link/{path}", f"link/../data/{path}"]
        return {loaded(**{key: form}).experiment_name for form in forms}

    found = [
        names("data__name", "corpus.jsonl"),
        names("data__name", "*.jsonl"),
        names("data__tokenizer", "tokenizer"),
        names("model__name", "model"),
    ]
    assert [len(each) for each in found] == [1, 1, 1, 1] and len(set.union(*found)) == 4


def test_a_choice_that_came_later_leaves_older_names_as_they_were() -> None:
    assert (
        "float8" not in choices(loaded())["parallelism"]
        and choices(loaded(parallelism__float8=True))["parallelism"]["float8"]
    )


@pytest.mark.parametrize(
    "change",
    [
        {"cluster__kind": "ray"},
        {"cluster__env": {"A": "1"}},
        {"cluster__device": "cpu"},
        {"cluster__max_failures": 0},
        {"parallelism__cuda_graphs": False},
        {"parallelism__async_tp": False},
        {"parallelism__reshard_after_forward": False},
        {"parallelism__direct_fsdp": True},
        {"checkpoint__storage_path": "/elsewhere"},
        {"checkpoint__interval": 7},
        {"checkpoint__keep_last": 9},
        {"checkpoint__resume": "never"},
        {"tracker__kind": "none"},
        {"train__log_interval": 1},
        {"train__eval_interval": 7},
        {"train__num_epochs": 9},
        {"train__max_steps": 9},
        {"train__max_steps_per_epoch": 9},
        {"train__profile": {"steps": 2}},
        {"dry_run": True},
    ],
    ids=str,
)
def test_the_derived_name_stays_whatever_the_place_and_the_length(change: dict[str, Any]) -> None:
    assert loaded(**change).experiment_name == NAME


ODD = (
    *("模型", "\u00e9" * 60, "e\u0301" * 60, "\U0001f433", "名" * 80),  # NFC, NFD, an emoji
    *("---", "...x", "-rf", ".hidden", "_", "x.", "m" * 240),
)


@pytest.mark.parametrize("model", ODD, ids=lambda name: ascii(name)[:12])
@pytest.mark.parametrize("data", ["数据", "d" * 240, "a...", "-", "a"], ids=lambda n: ascii(n)[:12])
def test_a_derived_name_is_valid_whatever_the_files_are_called(
    model: str, data: str, tmp_path: Path
) -> None:
    (tmp_path / model).mkdir()
    (tmp_path / model / "config.json").write_text(json.dumps(NUMBERS))
    texts = [tmp_path / f"{data}.jsonl", tmp_path / "other" / f"{data}.jsonl"]
    (tmp_path / "other").mkdir()
    for path in texts:
        path.write_text('{"text": "whale"}\n')
    names = {
        loaded(
            model__name=str(tmp_path / model), model__weights="random", data__name=str(path)
        ).experiment_name
        for path in texts
    }
    assert len(names) == 2
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]*", each) and len(each) <= 200 for each in names)


def test_a_derived_name_that_was_valid_stays(tmp_path: Path) -> None:
    """Letters that it can't take are dashes, as ever; no run that exists is lost."""
    (tmp_path / "Größe model").mkdir()
    (tmp_path / "Größe model" / "config.json").write_text(json.dumps(NUMBERS))
    (tmp_path / "数据.txt").write_text("whale")
    name = loaded(
        model__name=str(tmp_path / "Größe model"), data__name=str(tmp_path / "数据.txt")
    ).experiment_name
    assert name.startswith("gr-e-model---tp2_dp2-")


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"optim__lrr": 1}, "optim.lrr: unknown key; did you mean optim.lr?"),
        ({"optim__lr": "fast"}, "optim.lr=fast: must be a number"),
        ({"optim": 3}, "optim: is a group of keys"),
        ({"train__eval_interval": 0}, "train.eval_interval=0: must be at least 1"),
        ({"optim__min_lr_ratio": 2}, "optim.min_lr_ratio=2.0: must be at least 0 and at most 1"),
        ({"optim__betas": [0.9]}, "optim.betas=[0.9]: must be two numbers"),
        (
            {
                "optim__schedule": "wsd",
                "optim__decay_steps": 9,
                "optim__warmup_steps": 2,
                "train__max_steps": 10,
            },
            "optim.decay_steps=9:",
        ),
        (
            {"parallelism__dp_replicate": 2, "parallelism__dp": 3},
            "parallelism.dp_replicate=2: must divide parallelism.dp=3; allowed: 1, 3",
        ),
        (
            {"parallelism__cuda_graphs": True, "parallelism__compile": False},
            "parallelism.cuda_graphs=true: needs parallelism.compile",
        ),
        (
            {"parallelism__async_tp": True, "parallelism__compile": False},
            "parallelism.async_tp=true: needs parallelism.compile",
        ),
        (
            {"parallelism__async_tp": True, "parallelism__tp": 1},
            "parallelism.async_tp=true: needs parallelism.tp above 1",
        ),
        (
            {"parallelism__direct_fsdp": True, "parallelism__dp": 1},
            "parallelism.direct_fsdp=true: needs parallelism.dp above 1",
        ),
        (
            {"parallelism__direct_fsdp": True, "cluster__device": "cpu"},
            "parallelism.direct_fsdp=true: needs GPUs",
        ),
        (
            {"parallelism__compute_copies": True},
            "parallelism.compute_copies=true: needs parallelism.dp=1, not 2",
        ),
        (
            {"parallelism__cuda_graphs": True, "cluster__device": "cpu"},
            "parallelism.cuda_graphs=true: needs GPUs",
        ),
        ({"experiment_name": "a" * 256}, "has 256 letters, a directory's name at most 255"),
        ({"parallelism__tp": 16}, "degrees that do: 1, 2, 4, 8"),
        (
            {
                "model__overrides": {"num_attention_heads": 12, "hidden_size": 96},
                "parallelism__tp": 8,
            },
            "12 heads",
        ),
        ({"model__overrides": {"num_experts": 8}}, "mixture of 8 experts"),
        ({"model__overrides": {"hidden_size": "big"}}, "hidden_size is 'big', not a whole number"),
        ({"model__architecture": {}}, "model.name: nothing names a model"),
        (
            {"cluster__address": "host:1"},
            "cluster.address=host:1: only cluster=ray takes an address",
        ),
        ({"data__source": "hub"}, "data.name: is missing: data.source=hub needs a hub id"),
        ({"data__source": "json"}, "did you mean jsonl?"),
        ({"experiment_name": "../up"}, "experiment_name=../up: must be one directory name"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_refusals(change: dict[str, Any], says: str) -> None:
    assert says in refusal(**change)


def test_a_model_directory_without_a_config(tmp_path: Path) -> None:
    assert "this directory has no config.json" in refusal(model__name=str(tmp_path))
    assert "no such directory" in refusal(model__name=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("total", "micro", "dp", "says"),
    [
        (16, 4, 2, None),
        (8, 4, 2, None),
        (12, 4, 2, "train.micro_batch_size that works: 1, 2, 3, 6"),
        (7, 4, 2, "no micro-batch size works; a global batch that does: 8"),
    ],
)
def test_global_batch(total: int, micro: int, dp: int, says: str | None) -> None:
    if says is None:
        return check_global_batch(total, micro, dp)
    with pytest.raises(ConfigError, match=says):
        check_global_batch(total, micro, dp)


def test_degrees_of_real_models() -> None:
    qwen2_7b = {
        **NUMBERS,
        "vocab_size": 152064,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    assert Architecture.of(qwen2_7b, "it").tp_degrees() == [1, 2, 4]


def test_known_keys_are_all_leaves() -> None:
    keys = known_keys()
    assert {
        "seed",
        "optim.betas",
        "model.architecture",
        "model.recipe.lr",
        "train.profile.steps",
        "cluster.env",
    } <= set(keys)
    assert not {"model", "train.profile"} & set(keys)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optim.lrr", "optim.lr"),
        ("train.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("sed", "seed"),
        ("data.seqlen", "data.seq_length"),
        ("checkpoints.interval", "checkpoint.interval"),
        ("global_batch", "train.global_batch_size"),
        ("optimm", "optim"),
    ],
)
def test_the_nearest_key(typed: str, meant: str) -> None:
    assert f"did you mean {meant}?" in str(unknown_key(typed))


def test_fewer_layers_than_a_saved_config_lists(tmp_path: Path) -> None:
    """transformers 5 writes a type for each layer: those of the layers that stay, and of a deeper
    model it derives them.
    """
    saved = {**NUMBERS, "layer_types": ["full_attention"] * NUMBERS["num_hidden_layers"]}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert (
        load({"model": {"name": str(tmp_path)}}).model.architecture["layer_types"]
        == saved["layer_types"]
    )
    shrunk = load(
        {"model": {"name": str(tmp_path), "overrides": {"num_hidden_layers": 1}}}
    ).model.architecture
    assert shrunk["num_hidden_layers"] == 1 and shrunk["layer_types"] == ["full_attention"]
    deeper = load(
        {"model": {"name": str(tmp_path), "overrides": {"num_hidden_layers": 9}}}
    ).model.architecture
    assert deeper["num_hidden_layers"] == 9 and "layer_types" not in deeper


@pytest.mark.parametrize(
    ("heads", "kv_heads", "inner", "degrees"),
    [
        (9, 3, 1536, [1, 3]),
        (32, 8, 14336, [1, 2, 4, 8, 16, 32]),
        (8, 1, 384, [1, 2, 4, 8]),
        (12, 3, 384, [1, 3, 6, 12]),
        (14, 2, 4864, [1, 2]),
    ],
)
def test_degrees(heads: int, kv_heads: int, inner: int, degrees: list[int]) -> None:
    """Heads and intermediate size divided; key/value heads also replicated; any vocabulary."""
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": 509,
    }
    assert Architecture.of({**NUMBERS, **sizes}, "it").tp_degrees() == degrees


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [([], True), (["data"], False), (["data.name"], False), (["optim"], True)],
)
def test_other_tokens_under_the_same_name(allowed: list[str], refused: bool) -> None:
    config = load(
        {
            "experiment_name": "x",
            "model": {"architecture": NUMBERS},
            "checkpoint": {"allow_mismatch": allowed},
        }
    )
    check_same_tokens(config, "a", "a", "there")
    check_same_tokens(config, "a", None, "there")
    with (
        pytest.raises(ConfigError, match="other tokens than there was trained on")
        if refused
        else nullcontext()
    ):
        check_same_tokens(config, "a", "b", "there")
