"""conf/: every option of every group composes and loads, and states the numbers that the real
models have.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tp_trainer.cli.arguments import conf_dir
from tp_trainer.config import HYDRA, Config, architecture, load

CONF = conf_dir()
OPTIONS = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("experiment",)
)
# parameters as published with the models (embeddings once where they are tied)
PARAMETERS = {
    "qwen2_7b": 7_615_616_512,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_0_5b": 494_032_768,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "llama3_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "mistral_7b": 7_248_023_552,
    "smollm2_135m": 134_515_008,
}
# billions of parameters as model cards and reports round them; of Gemma 3 (arXiv:2503.19786) and
# Ministral 3 those of the text part
ROUNDED = {
    "qwen3_1_7b": 1.72,
    "qwen3_4b": 4.02,
    "qwen3_14b": 14.8,
    "qwen3_32b": 32.8,
    "qwen2_5_1_5b": 1.54,
    "qwen2_5_3b": 3.09,
    "qwen2_5_14b": 14.7,
    "qwen2_5_32b": 32.5,
    "qwen2_5_72b": 72.7,
    "llama3_1_8b": 8.03,
    "llama3_1_70b": 70.6,
    "llama3_2_3b": 3.21,
    "smollm3_3b": 3.08,
    "phi4": 14.7,
    "olmo3_7b": 7.3,
    "olmo3_32b": 32.2,
    "seed_oss_36b": 36.2,
    "exaone4_1_2b": 1.28,
    "exaone4_32b": 32.0,
    "gemma3_270m": 0.268,
    "gemma3_1b": 1.0,
    "gemma3_4b": 3.88,
    "gemma3_12b": 11.77,
    "gemma3_27b": 27.0,
    "ministral3_3b": 3.4,
    "ministral3_8b": 8.4,
    "ministral3_14b": 13.5,
    "mistral_small_24b": 23.6,
}
LEGACY_ROPE = {"rope_theta", "rope_scaling", "rope_local_base_freq"}
PUBLISHED = {**PARAMETERS, **{name: round(count * 1e9) for name, count in ROUNDED.items()}}


@pytest.fixture(scope="module", autouse=True)
def hydra_conf() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides: str) -> dict[str, Any]:
    values = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def loaded(*overrides: str) -> Config:
    return load(composed(*overrides))


def test_the_options_that_are_promised_are_there() -> None:
    there: dict[str, set[str]] = {}
    for group, option in OPTIONS:
        there.setdefault(group, set()).add(option)
    layouts = "tp1_dp1 tp2_dp1 tp1_dp2 tp2_dp2 tp1_dp4 tp4_dp1 tp4_dp2 tp2_dp4 tp8_dp1 tp1_dp8"
    assert there["model"] == {"tiny", *PUBLISHED}
    assert there["parallelism"] >= set(layouts.split())
    assert there["data"] >= {"moby_dick", "wikitext", "wikitext103", "jsonl", "text", "random"}
    assert there["tracker"] >= {"tensorboard", "wandb", "mlflow", "none"}
    assert there["cluster"] >= {"local", "ray", "anyscale", "kuberay"}
    assert there["optim"] >= {"adamw"}
    assert set(there) | {"experiment"} == {path.name for path in CONF.iterdir() if path.is_dir()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=str)
def test_every_option_composes_and_loads(group: str, option: str) -> None:
    overrides = [f"{group}={option}"]
    if group == "model":
        overrides.append("parallelism=tp1_dp1")
    if option in ("jsonl", "text"):
        overrides.append("data.name=some/file")
    config = loaded(*overrides)
    if group == "parallelism":
        assert config.parallelism.layout == option
    if group in ("cluster", "tracker"):
        assert getattr(config, group).kind == option


@pytest.mark.slow
def test_what_the_files_say_of_degrees() -> None:
    for path in (CONF / "model").glob("*.yaml"):
        degrees = architecture(loaded(f"model={path.stem}", "parallelism=tp1_dp1")).tp_degrees()
        said = re.search(r"tp (up to )?([\d, or]+)[.]", path.read_text().splitlines()[0])
        if said:
            numbers = [int(each) for each in re.findall(r"\d+", said[2])]
            assert numbers == (degrees[-1:] if said[1] else degrees), path.stem


def test_defaults() -> None:
    config = loaded()
    assert (config.model.name, config.model.weights, config.optim.lr, config.data.seq_length) == (
        None,
        "random",
        3e-3,
        128,
    )
    assert (
        config.parallelism.layout,
        config.cluster.num_workers,
        config.train.micro_batch_size,
    ) == ("tp2_dp2", 4, 4)
    assert (config.data.source, config.seed, config.train.log_interval, config.tracker.kind) == (
        "embedded",
        42,
        10,
        "tensorboard",
    )


def test_named_models_are_pretrained_unless_said_otherwise() -> None:
    config = loaded("model=qwen2_7b")
    assert (config.model.weights, config.data.seq_length, config.optim.lr) == (
        "pretrained",
        2048,
        1e-5,
    )
    assert loaded("model=qwen2_7b", "model.weights=random").model.weights == "random"
    for path in (CONF / "model").glob("*.yaml"):
        assert "weights" not in yaml.safe_load(path.read_text()), path


def test_the_hydra_block_is_the_one_that_saved_configs_have() -> None:
    assert yaml.safe_load((CONF / "config.yaml").read_text())["hydra"] == HYDRA


@pytest.mark.parametrize(("layout", "world"), [("tp2_dp2", 4), ("tp4_dp2", 8)])
def test_the_tutorial(layout: str, world: int) -> None:
    config = loaded("experiment=tutorial_qwen2_7b", f"parallelism={layout}")
    assert config.model.name == "Qwen/Qwen2-7B"
    assert (config.data.name, config.data.percentage, config.data.seq_length) == (
        "Salesforce/wikitext",
        10,
        2048,
    )
    assert (config.train.micro_batch_size, config.train.num_epochs) == (1, 3)
    assert (config.optim.lr, config.optim.weight_decay, config.seed) == (1e-5, 0.01, 42)
    assert config.cluster.num_workers == world


def test_the_command_line_wins_over_experiments_and_groups() -> None:
    config = loaded(
        "experiment=tutorial_qwen2_7b",
        "optim.lr=3e-4",
        "model=qwen2_5_0_5b",
        "data=moby_dick",
        "seed=7",
    )
    assert (config.optim.lr, config.model.name, config.data.source, config.seed) == (
        3e-4,
        "Qwen/Qwen2.5-0.5B",
        "embedded",
        7,
    )


def test_clusters_bring_their_storage_and_yield_to_a_typed_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ANYSCALE_ARTIFACT_STORAGE", raising=False)
    assert loaded("cluster=anyscale").checkpoint.storage_path == "/mnt/cluster_storage/tp_trainer"
    monkeypatch.setenv("ANYSCALE_ARTIFACT_STORAGE", "s3://bucket/artifacts")
    monkeypatch.setenv("TP_TRAINER_STORAGE", "/volume")
    assert loaded("cluster=anyscale").checkpoint.storage_path == "s3://bucket/artifacts/tp_trainer"
    assert loaded("cluster=kuberay").checkpoint.storage_path == "/volume/tp_trainer"
    assert (
        loaded("checkpoint.storage_path=/mine", "cluster=anyscale").checkpoint.storage_path
        == "/mine"
    )


@pytest.mark.slow
@pytest.mark.parametrize("option", PUBLISHED)
def test_architectures_are_the_real_ones(option: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = loaded(f"model={option}", "parallelism=tp1_dp1")
    fields = dict(config.model.architecture)
    assert fields["_name_or_path"] == config.model.name
    numbers = AutoConfig.for_model(**fields)
    unknown = set(fields) - set(numbers.to_dict()) - {"model_type", *LEGACY_ROPE}
    assert not unknown, f"transformers doesn't know {unknown}"
    if "rope_parameters" in fields:
        assert numbers.rope_parameters == fields["rope_parameters"]
    else:  # as the hub has them: two kinds of layers, of which one is scaled
        rope = numbers.rope_parameters["full_attention"]
        assert rope["rope_theta"] == fields["rope_theta"]
        assert rope.items() >= fields.get("rope_scaling", {}).items()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(numbers)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(PUBLISHED[option], rel=0 if option in PARAMETERS else 0.012)
    # the driver's own formula leaves biases and norms out
    assert architecture(config).num_parameters == pytest.approx(count, rel=1e-3)
    mine, theirs = dataclasses.asdict(architecture(config)), numbers.to_dict()
    head_dim = mine.pop("head_dim")
    assert mine == {key: theirs[key] for key in mine}
    assert head_dim == model.model.layers[0].self_attn.head_dim
    window = getattr(model.model.layers[0].self_attn, "sliding_window", None)
    assert window == (fields.get("sliding_window") or None)


def test_tiny_is_small() -> None:
    numbers = architecture(loaded())
    assert 1.5e6 < numbers.num_parameters < 2.5e6
    assert numbers.tp_degrees() == [1, 2, 4, 8]


def test_each_file_says_what_it_is() -> None:
    for path in CONF.glob("**/*.yaml"):
        lines = [
            line for line in path.read_text().splitlines() if not line.startswith("# @package")
        ]
        assert lines[0].startswith("# "), f"{Path(path).name} has no comment on top"
