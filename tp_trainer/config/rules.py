"""The rules: over single fields as they stand beside them, and over several keys together."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tp_trainer.config.architecture import Architecture, architecture
from tp_trainer.config.errors import ConfigError
from tp_trainer.config.identity import RUN_NAME, check_mismatch_names
from tp_trainer.config.resolved import Config
from tp_trainer.config.rope import positions
from tp_trainer.config.schema import Optim
from tp_trainer.config.source import check_data

FAMILIES = (
    "apertus",
    "apertus1p5_text",
    "arcee",
    "cohere",
    "cohere2",
    "cohere_compass_text",
    "cwm",
    "ernie4_5",
    "exaone",
    "exaone4",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "gpt_neox",
    "granite",
    "helium",
    "hunyuan_v1_dense",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "lfm2",
    "llama",
    "minicpm3",
    "ministral",
    "ministral3",
    "mistral",
    "nanochat",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "seed_oss",
    "smollm3",
    "starcoder2",
    "vaultgemma",
    "youtu",
)
"""transformers' model types that are certified: held against plain transformers, in
tests/distributed. What is special about them is in models/families; others run by rule."""


def check(config: Config) -> None:
    """The rules that bind several keys. Raises ConfigError at the first one that is broken."""
    numbers = architecture(config)
    _check_degrees(config, numbers)
    _check_fast_paths(config)
    _check_batch(config)
    _check_length(config)
    optim, train = config.optim, config.train
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError(
            "optim.betas", optim.betas, "must be two numbers in [0, 1), e.g. [0.9,0.95]"
        )
    if train.max_steps is not None:
        check_schedule_length(optim, train.max_steps)
    if config.task != "export":
        check_data(config.data)
    if config.cluster.address is not None and config.cluster.kind != "ray":
        raise ConfigError(
            "cluster.address",
            config.cluster.address,
            f"only cluster=ray takes an address, not cluster={config.cluster.kind}",
        )
    check_mismatch_names(config)
    name = config.experiment_name
    if not re.fullmatch(RUN_NAME, name):
        raise ConfigError(
            "experiment_name", name, "must be one directory name of letters, digits and . _ - = , +"
        )
    if len(name) > 255:
        raise ConfigError(
            "experiment_name", name, f"has {len(name)} letters, a directory's name at most 255"
        )


def _check_degrees(config: Config, numbers: Architecture) -> None:
    parallelism, model = config.parallelism, config.model
    degrees = numbers.tp_degrees()
    if parallelism.tp not in degrees:
        raise ConfigError(
            "parallelism.tp",
            parallelism.tp,
            f"must divide the model's {numbers.num_attention_heads} heads and intermediate size"
            f" {numbers.intermediate_size}, and divide or be a multiple of its"
            f" {numbers.num_key_value_heads} key/value heads; degrees that do:"
            f" {', '.join(map(str, degrees))}",
        )
    if model.revision is not None and (model.name is None or Path(model.name).is_dir()):
        raise ConfigError(
            "model.revision",
            model.revision,
            "only a hub id has revisions, and model.name is none",
        )
    if parallelism.dp % parallelism.dp_replicate:
        raise ConfigError(
            "parallelism.dp_replicate",
            parallelism.dp_replicate,
            f"must divide parallelism.dp={parallelism.dp}; allowed: {_divisors(parallelism.dp)}",
        )


def _check_fast_paths(config: Config) -> None:
    parallelism = config.parallelism
    if parallelism.cuda_graphs and (parallelism.compile is False or config.cluster.device == "cpu"):
        raise ConfigError(
            "parallelism.cuda_graphs",
            True,
            f"needs {'parallelism.compile' if parallelism.compile is False else 'GPUs'}; leave it"
            " null",
        )
    if parallelism.direct_fsdp and (parallelism.dp == 1 or config.cluster.device == "cpu"):
        need = "GPUs" if config.cluster.device == "cpu" else "parallelism.dp above 1"
        raise ConfigError("parallelism.direct_fsdp", True, f"needs {need}; leave it null")
    if parallelism.compute_copies and parallelism.dp > 1:
        raise ConfigError(
            "parallelism.compute_copies",
            True,
            f"needs parallelism.dp=1, not {parallelism.dp}: FSDP2 casts what it gathers; leave it"
            " null",
        )
    if parallelism.async_tp:
        needs = {
            "parallelism.tp above 1": parallelism.tp > 1,
            "parallelism.sequence_parallel": parallelism.sequence_parallel,
            "parallelism.compile": (
                parallelism.compile
                or (parallelism.compile is None and config.cluster.device != "cpu")
            ),
        }
        for need, given in needs.items():
            if not given:
                raise ConfigError("parallelism.async_tp", True, f"needs {need}; leave it null")


def _check_batch(config: Config) -> None:
    parallelism, train = config.parallelism, config.train
    if config.cluster.num_workers != parallelism.world_size:
        raise ConfigError(
            "cluster.num_workers",
            config.cluster.num_workers,
            f"must be tp x dp = {parallelism.tp} x {parallelism.dp} = {parallelism.world_size};"
            " leave it out, it is derived",
        )
    if train.global_batch_size is not None:
        check_global_batch(train.global_batch_size, train.micro_batch_size, parallelism.dp)


def _check_length(config: Config) -> None:
    data, tp = config.data, config.parallelism.tp
    most = positions(config.model.architecture)
    if data.seq_length > most:
        raise ConfigError(
            "data.seq_length",
            data.seq_length,
            f"the model has {most} positions; give at most that many",
        )
    if data.seq_length % tp:
        lower = data.seq_length // tp * tp
        raise ConfigError(
            "data.seq_length",
            data.seq_length,
            f"must be divisible by parallelism.tp={tp}, e.g. {lower or tp}",
        )


def check_global_batch(total: int, micro: int, dp: int) -> None:
    """Raises ConfigError unless `total` sequences are whole steps of `dp` ranks with `micro`
    sequences each.
    """
    if total % (micro * dp):
        works = [str(n) for n in range(1, total // dp + 1) if total % (n * dp) == 0]
        hint = (
            f"train.micro_batch_size that works: {', '.join(works)}"
            if works
            else (
                "no micro-batch size works; a global batch that does:"
                f" {math.ceil(total / (micro * dp)) * micro * dp}"
            )
        )
        raise ConfigError(
            "train.global_batch_size",
            total,
            f"must be a multiple of train.micro_batch_size x parallelism.dp = {micro} x {dp} ="
            f" {micro * dp}; {hint}",
        )


def check_schedule_length(optim: Optim, total_steps: int) -> None:
    """Raises ConfigError where a typed warm-up or decay doesn't fit into `total_steps` steps."""
    if optim.warmup_steps is not None and optim.warmup_steps > total_steps:
        raise ConfigError(
            "optim.warmup_steps",
            optim.warmup_steps,
            f"longer than the run of {total_steps} steps; leave it null for 5 %",
        )
    if (
        optim.schedule == "wsd"
        and optim.decay_steps is not None
        and optim.decay_steps + (optim.warmup_steps or 0) > total_steps
    ):
        raise ConfigError(
            "optim.decay_steps",
            optim.decay_steps,
            f"warm-up and decay are longer than the run of {total_steps} steps",
        )


def check_fields(node: Any, prefix: str) -> None:
    """The rules that stand beside single fields."""
    for each in dataclasses.fields(node):
        value, key, rule = getattr(node, each.name), prefix + each.name, each.metadata
        if dataclasses.is_dataclass(value):
            check_fields(value, key + ".")
        if value is None or not rule:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if (
            rule.get("one_of")
            and value not in rule["one_of"]
            and not (number and rule.get("least") is not None)
        ):
            near = difflib.get_close_matches(str(value), rule["one_of"], n=1)
            hint = rule["why_not"].get(value) or (f"did you mean {near[0]}?" if near else None)
            raise ConfigError(
                key, value, f"must be {_choice(rule)}" + (f"; {hint}" if hint else "")
            )
        if number:
            bounds = [
                ("least", "at least", lambda a, b: a >= b),
                ("above", "above", lambda a, b: a > b),
                ("most", "at most", lambda a, b: a <= b),
                ("below", "below", lambda a, b: a < b),
            ]
            stated = [
                (words, rule[name]) for name, words, _ in bounds if rule.get(name) is not None
            ]
            if not math.isfinite(value) or any(
                rule.get(n) is not None and not holds(value, rule[n]) for n, _, holds in bounds
            ):
                raise ConfigError(
                    key,
                    value,
                    "must be "
                    + (" and ".join(f"{words} {bound:g}" for words, bound in stated) or "finite"),
                )


def _choice(rule: Mapping[str, Any]) -> str:
    words = ", ".join(rule["one_of"])
    return (
        f"one of {words}"
        if rule.get("least") is None
        else f"a number of at least {rule['least']:g}, or {words}"
    )


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
