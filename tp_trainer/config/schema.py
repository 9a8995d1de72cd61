"""The schema: a dataclass per configuration group, each field with its default, its meaning and the
values that it may take. Here the groups of the training itself, and the whole.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from tp_trainer.config.setting import DTYPES, UNSCALED, setting
from tp_trainer.config.surroundings import Bench, Checkpoint, Cluster, Export, Tracker, Verify


@dataclass
class Recipe:
    """What a model's group suggests for keys of other groups that the user leaves null."""

    seq_length: int | None = setting(None, "tokens per row", least=1)
    lr: float | None = setting(None, "peak learning rate", above=0)


@dataclass
class Model:
    name: str | None = setting(
        None, "hub id or directory; given alone, it replaces the group's architecture"
    )
    revision: str | None = setting(None, "the hub id's branch, tag or commit; null = main")
    weights: str | None = setting(
        None,
        "pretrained or random; null = pretrained, random where the group names no model",
        one_of=("pretrained", "random"),
    )
    architecture: dict[str, Any] = setting(
        {}, "the numbers of a transformers config (model_type, hidden_size, ...)"
    )
    overrides: dict[str, Any] = setting(
        {}, "config fields put over the architecture, e.g. model.overrides.num_hidden_layers=2"
    )
    family: str | None = setting(
        None,
        "package.module:name of the record (tp_trainer.models.families.Family) of a family that"
        " has none here",
    )
    trust_remote_code: bool = setting(False, "run code that comes with the model")
    recipe: Recipe = field(
        default_factory=Recipe,
        metadata={"help": "what the group suggests for data.seq_length and optim.lr"},
    )


@dataclass
class Parallelism:
    tp: int = setting(2, "tensor-parallel degree (innermost mesh dimension)", least=1)
    dp: int = setting(2, "data-parallel degree, replicas included", least=1)
    dp_replicate: int = setting(
        1, "HSDP: how many times the sharded parameters are replicated; divides dp", least=1
    )
    sequence_parallel: bool = setting(
        True, "split norms and the residual stream over tp along the sequence"
    )
    activation_checkpointing: str = setting(
        "none", "recompute activations in the backward pass", one_of=("none", "full", "selective")
    )
    compile: bool | None = setting(None, "torch.compile each block; null = on GPUs")
    cuda_graphs: bool | None = setting(
        None, "replay micro-batches as CUDA graphs; null = on GPUs, with compile"
    )
    async_tp: bool | None = setting(
        None,
        "run matmuls beside tp's collectives; null = at tp2_dp1, with compile, on GPUs with peer"
        " access",
    )
    direct_fsdp: bool | None = setting(
        None,
        "FSDP2 by peer access, without its copies; null = at tp1_dp2, on GPUs with peer access",
    )
    compute_copies: bool | None = setting(
        None,
        "where dp is 1, keep all weights in the dtype of compute too; false = cast block by block,"
        " less memory; null = where they fit",
    )
    reshard_after_forward: bool = setting(
        True,
        "free a block's parameters until its backward pass; false = gathered once, more memory",
    )
    float8: bool = setting(
        False, "multiply in float8 in the linears of the blocks, forward and backward"
    )
    param_dtype: str | None = setting(
        None,
        "dtype of compute; null = bfloat16 on GPUs, float32 on CPU",
        one_of=DTYPES[:2],
        why_not=UNSCALED,
    )
    reduce_dtype: str | None = setting(
        None, "dtype of gradient reduction; null = float32", one_of=DTYPES[:2], why_not=UNSCALED
    )

    @property
    def world_size(self) -> int:
        return self.tp * self.dp

    @property
    def layout(self) -> str:
        """The layout's short name, as the group files have it: tp2_dp2, tp2_dp4_rep2."""
        return f"tp{self.tp}_dp{self.dp}" + (
            f"_rep{self.dp_replicate}" if self.dp_replicate > 1 else ""
        )


SOURCES = ("embedded", "hub", "jsonl", "text", "random")


@dataclass
class Data:
    source: str | None = setting(
        None,
        "where documents come from; null = what data.name is, without one the embedded text",
        one_of=SOURCES,
    )
    name: str | None = setting(
        None,
        "a file, a glob or a directory of JSON lines or text; a table or a directory of them; or a"
        " hub id",
    )
    subset: str | None = setting(None, "the hub dataset's configuration")
    revision: str | None = setting(
        None, "the hub dataset's commit, branch or tag; null = the newest"
    )
    split: str = setting("train", "the hub dataset's training split")
    validation_split: str | None = setting(
        None, "the hub dataset's validation split; null = hold out validation_percentage"
    )
    validation_percentage: float = setting(
        5.0, "held out from the end where there is no validation split", above=0, below=100
    )
    text_column: str = setting("text", "the column that holds the text")
    percentage: float = setting(
        100.0, "use the first so many percent of the training documents", above=0, most=100
    )
    seq_length: int | None = setting(
        None, "tokens per row; null = the model group's, else 2048", least=1
    )
    tokenizer: str | None = setting(
        None, "hub id, directory or `embedded`; null = the model's own, else the embedded one"
    )
    shuffle: bool = setting(True, "a new order of rows in every epoch")
    cache_dir: str | None = setting(None, "where token files are kept; null = ~/.cache/tp_trainer")


@dataclass
class Optim:
    name: str = setting("adamw", "the optimizer", one_of=("adamw",))
    lr: float | None = setting(
        None,
        "peak learning rate; null = the model group's, else 1e-5 pretrained, 3e-4 random",
        least=0,
    )
    weight_decay: float = setting(
        0.1, "decoupled decay; vectors (norms, biases) have none", least=0
    )
    betas: list[float] = setting([0.9, 0.95], "AdamW's moment decay rates, each in [0, 1)")
    eps: float = setting(1e-8, "AdamW's epsilon", above=0)
    schedule: str = setting(
        "cosine", "what follows the warm-up", one_of=("cosine", "linear", "constant", "wsd")
    )
    warmup_steps: int | None = setting(
        None, "steps of linear warm-up; null = 5 % of the run", least=0
    )
    decay_steps: int | None = setting(
        None, "wsd: steps of the final decay; null = 10 % of the run", least=0
    )
    min_lr_ratio: float = setting(0.1, "the schedule ends at this part of lr", least=0, most=1)


@dataclass
class Profile:
    steps: int = setting(
        0, "profile so many steps (0 = none); the trace goes to <run>/profile", least=0
    )
    start: int = setting(10, "steps done before the profiler starts", least=0)


@dataclass
class Train:
    micro_batch_size: int = setting(4, "sequences per data-parallel rank and forward pass", least=1)
    global_batch_size: int | None = setting(
        None,
        "sequences per step; null = micro_batch_size x dp, fixed at the first start; more ="
        " gradient accumulation",
        least=1,
    )
    num_epochs: int = setting(1, "passes over the data", least=1)
    max_steps_per_epoch: int | None = setting(
        None, "steps after which an epoch ends; null = all", least=1
    )
    max_steps: int | None = setting(
        None, "length of the run in steps; overrides num_epochs", least=1
    )
    clip_grad_norm: float | None = setting(
        1.0, "clip the global gradient norm; null = don't", above=0
    )
    max_skipped_steps: int | None = setting(
        10,
        "so many steps in a row without a finite loss and gradient norm (each is skipped) end the"
        " run; null = never",
        least=1,
    )
    spike_zscore: float | None = setting(
        None,
        "skip steps whose loss or gradient norm lies so many standard deviations above the last"
        " ones'; null = don't",
        above=0,
    )
    spike_window: int = setting(100, "how many of the last steps spike_zscore looks at", least=2)
    log_interval: int = setting(10, "steps between lines of metrics.jsonl", least=1)
    eval_interval: int | None = setting(
        100, "steps between evaluations; null = at the end only", least=1
    )
    eval_batches: int | None = setting(
        None, "global batches of validation rows per evaluation; null = all", least=1
    )
    drift_interval: int | None = setting(
        1000,
        "steps between checks that parameters replicated over tp are still equal; null = don't",
        least=1,
    )
    deterministic: bool = setting(False, "deterministic kernels only")
    profile: Profile = field(default_factory=Profile, metadata={"help": "the profiler"})


@dataclass
class Settings:
    """All that a user may say, with null for what is to be derived; `load` makes a Config of it."""

    task: str = setting("train", "what to do", one_of=("train", "export", "verify", "bench"))
    dry_run: bool = setting(False, "print the composed config and the mesh, start nothing")
    experiment_name: str | None = setting(
        None, "the run's directory; null = derived from every choice that matters to the result"
    )
    seed: int = setting(42, "of weights, order and dropout", least=0)
    model: Model = field(default_factory=Model)
    parallelism: Parallelism = field(default_factory=Parallelism)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    cluster: Cluster = field(default_factory=Cluster)
    tracker: Tracker = field(default_factory=Tracker)
    export: Export = field(default_factory=Export)
    verify: Verify = field(default_factory=Verify)
    bench: Bench = field(default_factory=Bench)


def known_keys(kind: Any = Settings, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted."""
    keys: list[str] = []
    kinds = get_type_hints(kind)
    for each in dataclasses.fields(kind):
        nested = kinds[each.name] if dataclasses.is_dataclass(kinds[each.name]) else None
        keys += known_keys(nested, f"{prefix}{each.name}.") if nested else [prefix + each.name]
    return keys


@cache
def text_keys() -> frozenset[str]:
    """The dotted keys of the schema whose values are text, or lists of texts."""

    def of(kind: Any, prefix: str) -> set[str]:
        keys, kinds = set[str](), get_type_hints(kind)
        for each in dataclasses.fields(kind):
            hint, key = kinds[each.name], prefix + each.name
            if dataclasses.is_dataclass(hint):
                keys |= of(hint, f"{key}.")
            elif hint in (str, str | None, list[str]):
                keys.add(key)
        return keys

    return frozenset(of(Settings, ""))


def cache_dir(data: Data) -> Path:
    """Where token files are kept on each node."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(data.cache_dir or f"{base}/tp_trainer").expanduser()
