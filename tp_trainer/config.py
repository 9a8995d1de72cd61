"""The schema of a run: one dataclass per configuration group, the rules that bind them, and `load`.

Everything here is plain Python: the driver, every worker and every test build the same `Config` from the same
plain dictionary with the same function. Rules over one field stand beside the field (`setting(...)`); rules over
several stand in `check`. Values that are null in the files and follow from others are filled in by `resolve`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """Something the user asked for can't be had. `str()` of it is one line made for that person."""

    def __init__(self, key: str, value: object, message: str) -> None:
        shown = "" if value is None else f"={_shown(value)}"
        super().__init__(f"{key}{shown}: {message}" if key else message)
        self.key, self.value, self.message = key, value, message

    def __reduce__(self) -> tuple[Any, ...]:  # exceptions with several arguments don't pickle by themselves
        return (ConfigError, (self.key, self.value, self.message))


def setting(
    default: Any,
    help: str,
    *,
    one_of: Sequence[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its meaning and the values that it may take (null is always let through)."""
    metadata = {"help": help, "one_of": one_of, "least": least, "above": above, "most": most, "below": below}
    if isinstance(default, (list, dict)):
        kind = type(default)
        return field(default_factory=lambda: kind(default), metadata=metadata)
    return field(default=default, metadata=metadata)


DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Recipe:
    """What a model's group suggests for keys of other groups that the user leaves null."""

    seq_length: int | None = setting(None, "tokens per row", least=1)
    lr: float | None = setting(None, "peak learning rate", above=0)


@dataclass
class Model:
    name: str | None = setting(None, "hub id or directory; given alone, it replaces the group's architecture")
    weights: str | None = setting(
        None, "pretrained or random; null = pretrained, random where the group names no model", one_of=("pretrained", "random")
    )
    architecture: dict[str, Any] = setting({}, "the numbers of a transformers config (model_type, hidden_size, ...)")
    overrides: dict[str, Any] = setting({}, "config fields put over the architecture, e.g. model.overrides.num_hidden_layers=2")
    trust_remote_code: bool = setting(False, "run code that comes with the model")
    recipe: Recipe = field(default_factory=Recipe, metadata={"help": "what the group suggests for data.seq_length and optim.lr"})


@dataclass
class Parallelism:
    tp: int = setting(2, "tensor-parallel degree (innermost mesh dimension)", least=1)
    dp: int = setting(2, "data-parallel degree, replicas included", least=1)
    dp_replicate: int = setting(1, "HSDP: how many times the sharded parameters are replicated; divides dp", least=1)
    sequence_parallel: bool = setting(True, "split norms and the residual stream over tp along the sequence")
    activation_checkpointing: str = setting("none", "recompute activations in the backward pass", one_of=("none", "full", "selective"))
    compile: bool | None = setting(None, "torch.compile each block; null = on GPUs")
    param_dtype: str | None = setting(None, "dtype of compute; null = bfloat16 on GPUs, float32 on CPU", one_of=DTYPES)
    reduce_dtype: str | None = setting(None, "dtype of gradient reduction; null = float32", one_of=DTYPES)

    @property
    def world_size(self) -> int:
        return self.tp * self.dp

    @property
    def layout(self) -> str:
        """The layout's short name, as the group files have it: tp2_dp2, tp2_dp4_rep2."""
        return f"tp{self.tp}_dp{self.dp}" + (f"_rep{self.dp_replicate}" if self.dp_replicate > 1 else "")


@dataclass
class Data:
    source: str = setting("embedded", "where documents come from", one_of=("embedded", "hub", "jsonl", "text", "random"))
    name: str | None = setting(None, "hub id; for jsonl and text a file, a glob or a directory")
    subset: str | None = setting(None, "the hub dataset's configuration")
    split: str = setting("train", "the hub dataset's training split")
    validation_split: str | None = setting(None, "the hub dataset's validation split; null = hold out validation_percentage")
    validation_percentage: float = setting(5.0, "held out from the end where there is no validation split", above=0, below=100)
    text_column: str = setting("text", "the column that holds the text")
    percentage: float = setting(100.0, "use the first so many percent of the training documents", above=0, most=100)
    seq_length: int | None = setting(None, "tokens per row; null = the model group's, else 2048", least=1)
    tokenizer: str | None = setting(None, "hub id, directory or `embedded`; null = the model's own, else the embedded one")
    shuffle: bool = setting(True, "a new order of rows in every epoch")
    cache_dir: str | None = setting(None, "where token files are kept; null = ~/.cache/tp_trainer")


@dataclass
class Optim:
    name: str = setting("adamw", "the optimizer", one_of=("adamw",))
    lr: float | None = setting(None, "peak learning rate; null = the model group's, else 1e-5 pretrained, 3e-4 random", least=0)
    weight_decay: float = setting(0.1, "decoupled decay; norms and biases have none", least=0)
    betas: list[float] = setting([0.9, 0.95], "AdamW's moment decay rates, each in [0, 1)")
    eps: float = setting(1e-8, "AdamW's epsilon", above=0)
    schedule: str = setting("cosine", "what follows the warm-up", one_of=("cosine", "linear", "constant", "wsd"))
    warmup_steps: int | None = setting(None, "steps of linear warm-up; null = 5 % of the run", least=0)
    decay_steps: int | None = setting(None, "wsd: steps of the final decay; null = 10 % of the run", least=0)
    min_lr_ratio: float = setting(0.1, "the schedule ends at this part of lr", least=0, most=1)


@dataclass
class Profile:
    steps: int = setting(0, "profile so many steps (0 = none); the trace goes to <run>/profile", least=0)
    start: int = setting(10, "steps done before the profiler starts", least=0)


@dataclass
class Train:
    micro_batch_size: int = setting(4, "sequences per data-parallel rank and forward pass", least=1)
    global_batch_size: int | None = setting(
        None, "sequences per step; null = micro_batch_size x dp, fixed at the first start; more = gradient accumulation", least=1
    )
    num_epochs: int = setting(1, "passes over the data", least=1)
    max_steps_per_epoch: int | None = setting(None, "steps after which an epoch ends; null = all", least=1)
    max_steps: int | None = setting(None, "length of the run in steps; overrides num_epochs", least=1)
    clip_grad_norm: float | None = setting(1.0, "clip the global gradient norm; null = don't", above=0)
    log_interval: int = setting(10, "steps between lines of metrics.jsonl", least=1)
    eval_interval: int | None = setting(100, "steps between evaluations; null = at the end only", least=1)
    eval_batches: int | None = setting(None, "validation batches per evaluation; null = all", least=1)
    deterministic: bool = setting(False, "deterministic kernels only")
    profile: Profile = field(default_factory=Profile, metadata={"help": "the profiler"})


@dataclass
class Checkpoint:
    storage_path: str = setting("outputs", "where runs live: a local or shared directory")
    interval: int | None = setting(100, "steps between checkpoints; null = at the end only", least=1)
    keep_last: int = setting(2, "how many checkpoints to keep", least=1)
    resume: str = setting("auto", "auto, never, or the path of a checkpoint")


@dataclass
class Cluster:
    kind: str = setting("local", "how Ray is reached", one_of=("local", "ray", "anyscale", "kuberay"))
    address: str | None = setting(None, "ray: the running cluster's address; null = auto")
    device: str = setting("auto", "auto = GPUs where there are any", one_of=("auto", "cpu", "gpu"))
    num_workers: int | None = setting(None, "derived (tp x dp); where stated it must agree", least=1)
    cpus_per_worker: float = setting(1, "CPUs that Ray reserves for each worker", above=0)
    accelerator_type: str | None = setting(None, "the GPU model that Ray must place workers on, e.g. H100")
    max_failures: int = setting(3, "restarts after failed workers", least=0)
    env: dict[str, str] = setting({}, "environment of the workers; never logged")


@dataclass
class Tracker:
    kind: str = setting("tensorboard", "where metrics go besides metrics.jsonl", one_of=("tensorboard", "wandb", "mlflow", "none"))
    project: str = setting("tp_trainer", "W&B project or MLflow experiment")
    uri: str | None = setting(None, "MLflow tracking server; null = a database in the run's directory")


@dataclass
class Config:
    task: str = setting("train", "what to do", one_of=("train",))
    dry_run: bool = setting(False, "print the composed config and the mesh, start nothing")
    experiment_name: str | None = setting(None, "the run's directory; null = derived from every choice that matters to the result")
    seed: int = setting(42, "of weights, order and dropout", least=0)
    model: Model = field(default_factory=Model)
    parallelism: Parallelism = field(default_factory=Parallelism)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    cluster: Cluster = field(default_factory=Cluster)
    tracker: Tracker = field(default_factory=Tracker)

    @property
    def run_dir(self) -> str:
        """The run's directory, absolute once `resolve` has been through."""
        return f"{self.checkpoint.storage_path.rstrip('/')}/{self.experiment_name}"


# ---------------------------------------------------------------------------------------------------- architecture


@dataclass(frozen=True)
class Architecture:
    """The numbers of a dense decoder that the driver needs, under transformers' names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, numbers: Mapping[str, Any], where: str) -> Architecture:
        """From the fields of a transformers config. Raises ConfigError naming the first one that is missing."""
        numbers = {**numbers, **(numbers.get("text_config") or {})}

        def need(name: str) -> int:
            value = numbers.get(name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(where, None, f"{name} is {'missing' if value is None else f'{value!r}, not a whole number'}: "
                                  "only dense decoders that state it can be trained")
            return value

        if not numbers.get("model_type"):
            raise ConfigError(where, None, "model_type is missing; give model.name=<hub id or directory> or model=<group>")
        experts = numbers.get("num_local_experts") or numbers.get("num_experts") or numbers.get("n_routed_experts")
        if experts:
            raise ConfigError(where, None, f"is a mixture of {experts} experts; only dense models can be trained")
        heads, hidden = need("num_attention_heads"), need("hidden_size")
        return cls(
            model_type=str(numbers["model_type"]),
            vocab_size=need("vocab_size"),
            hidden_size=hidden,
            intermediate_size=need("intermediate_size"),
            num_hidden_layers=need("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=numbers.get("num_key_value_heads") or heads,
            head_dim=numbers.get("head_dim") or hidden // heads,
            max_position_embeddings=need("max_position_embeddings"),
            tie_word_embeddings=bool(numbers.get("tie_word_embeddings", False)),
        )

    @property
    def num_parameters(self) -> int:
        """Parameters of a gated-MLP decoder, biases and norms left out (under 0.1 % of any real model)."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        tables = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * (attention + mlp) + tables * self.vocab_size * self.hidden_size

    def tp_degrees(self) -> list[int]:
        """The tensor-parallel degrees that divide heads, key/value heads, intermediate size and vocabulary."""
        common = math.gcd(self.num_attention_heads, self.num_key_value_heads, self.intermediate_size, self.vocab_size)
        return [n for n in range(1, common + 1) if common % n == 0]


def architecture_fields(model: Model) -> dict[str, Any]:
    """The transformers config fields of the chosen model: the group's, the directory's, or the hub's config.json.

    The group's architecture holds for the name that it carries (`_name_or_path`); another `model.name` replaces it.
    """
    own = model.architecture.get("_name_or_path")
    if model.architecture and model.name in (None, own):
        fields = dict(model.architecture)
    elif model.name is None:
        raise ConfigError("model.name", None, "nothing names a model: give model=<group> or model.name=<hub id or directory>")
    else:
        fields = json.loads(_config_file(model.name).read_text())
    return {**fields, **model.overrides}


HUB_TIMEOUT = 3  # seconds until the hub counts as out of reach


def _config_file(name: str) -> Path:
    """config.json of a model directory, or of a hub id (fetched, or from the hub's cache)."""
    if Path(name).is_dir():
        path = Path(name) / "config.json"
        if not path.is_file():
            raise ConfigError("model.name", name, "this directory has no config.json")
        return path
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ConfigError("model.name", name, "no such directory, and not a hub id (owner/model)")
    # huggingface_hub imports in 0.2 s, and only where the hub is asked; its own retries would take half a minute
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set, and it is not in the cache")
        with socket.create_connection((urlsplit(hf_hub_url(name, "config.json")).hostname or "", 443), timeout=HUB_TIMEOUT):
            pass
        return Path(hf_hub_download(name, "config.json", etag_timeout=HUB_TIMEOUT))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError("model.name", name, f"no such directory, and the hub gave no config.json ({reason})") from error


# ----------------------------------------------------------------------------------------------------------- loading


def load(values: Mapping[str, Any]) -> Config:
    """A checked, resolved Config from a plain dictionary (the command line's, a saved config.yaml's, a worker's).

    Raises:
        ConfigError: an unknown key, a wrong type, a value or a combination that is not allowed.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(dict(values)))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise translate(error) from error
    assert isinstance(config, Config)
    _check_fields(config, "")
    resolve(config)
    check(config)
    return config


def plain(config: Config) -> dict[str, Any]:
    """The Config as plain dictionaries, lists and scalars: what travels to the workers and into config.yaml."""
    return dataclasses.asdict(config)


HYDRA: dict[str, Any] = {
    "job": {"name": "tp_trainer", "chdir": False},
    "run": {"dir": "."},
    "sweep": {"dir": "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}", "subdir": "${hydra.job.num}"},
    "output_subdir": None,
    "job_logging": {"root": {"level": "WARNING"}},
}  # the block of conf/config.yaml


def to_yaml(config: Config) -> str:
    """The Config as a primary config of its own: `--config-path <its directory>` runs it again, through the same schema.

    What follows from other keys as plainly as the number of workers is left null, so that an override of those moves it.
    `cluster.env` may hold secrets: its names are written, its values come from the environment of whoever runs it again.
    """
    values = plain(config)
    if config.cluster.num_workers == config.parallelism.world_size:
        values["cluster"]["num_workers"] = None
    values["cluster"]["env"] = {name: f"${{oc.env:{name}}}" for name in config.cluster.env}
    defaults = ["schema", "_self_", {"override hydra/job_logging": "stdout"}]
    return str(OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults, "hydra": HYDRA, **values})))


def resolve(config: Config) -> None:
    """Fill in, in place, what is null and follows from other keys.

    train.global_batch_size stays null: the driver fixes it at a run's first start, or takes the checkpoint's.
    """
    model, data = config.model, config.data
    if model.name is not None and Path(model.name).expanduser().is_dir():
        model.name = str(Path(model.name).expanduser().resolve())
    grouped = bool(model.architecture) and model.name in (None, model.architecture.get("_name_or_path"))
    model.weights = model.weights or ("random" if model.name is None else "pretrained")
    model.architecture = architecture_fields(model)
    model.overrides = {}  # they are in the architecture now
    if model.name is not None:
        model.architecture["_name_or_path"] = model.name  # so that it is taken as it stands when loaded again
    recipe = model.recipe if grouped else Recipe()
    if data.seq_length is None:
        data.seq_length = recipe.seq_length or min(2048, architecture(config).max_position_embeddings)
    if config.optim.lr is None:
        config.optim.lr = recipe.lr or (1e-5 if model.weights == "pretrained" else 3e-4)
    if config.cluster.num_workers is None:
        config.cluster.num_workers = config.parallelism.world_size
    if "://" not in config.checkpoint.storage_path:
        config.checkpoint.storage_path = str(Path(config.checkpoint.storage_path).expanduser().resolve())
    if config.checkpoint.resume not in ("auto", "never") and "://" not in config.checkpoint.resume:
        config.checkpoint.resume = str(Path(config.checkpoint.resume).expanduser().resolve())
    if config.experiment_name is None:  # last but for the batch: the name must not depend on what is only derived
        config.experiment_name = derived_name(config)


def architecture(config: Config) -> Architecture:
    """The numbers of the chosen model."""
    where = f"model.name={config.model.name}" if config.model.name else "model.architecture"
    return Architecture.of(config.model.architecture, where)


RUN_LENGTH = ("num_epochs", "max_steps_per_epoch", "max_steps")
INTERVALS = ("log_interval", "eval_interval", "eval_batches", "profile")


def choices(config: Config) -> dict[str, Any]:
    """Every choice that shapes the numbers of a run, by group: run length, intervals and where it runs left out."""
    values = plain(config)
    kept = {key: values[key] for key in ("seed", "model", "parallelism", "data", "optim", "train")}
    for key in RUN_LENGTH + INTERVALS:
        del kept["train"][key]
    del kept["model"]["recipe"], kept["data"]["cache_dir"]
    return kept


def derived_name(config: Config) -> str:
    """A name that is the same for the same choices: a readable part and a hash of all that shapes the numbers."""
    digest = hashlib.sha256(json.dumps(choices(config), sort_keys=True, default=str).encode()).hexdigest()[:8]
    model = Path(str(config.model.name or config.model.architecture.get("_name_or_path") or config.model.architecture["model_type"])).name
    data = Path(config.data.name).stem if config.data.name else config.data.source
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model}-{data}-{config.parallelism.layout}-{digest}").lower()


def check_same_run(config: Config, stored: Mapping[str, Any]) -> None:
    """Raises ConfigError where a resume would change what a run is. Layout, micro-batch and run length may change.

    Args:
        stored: the run's config.yaml, as plain dictionaries.
    """
    mine = choices(config)
    for group in ("seed", "model", "data", "optim", "train"):
        for key, value in _flat(mine[group], group).items():
            before = _flat(stored.get(group), group).get(key, value)
            if before != value and key not in ("train.micro_batch_size", "train.global_batch_size"):
                hint = "give another experiment_name (null derives one), or checkpoint.resume=never to start it anew"
                raise ConfigError(key, value, f"the run in {config.run_dir} was started with {_shown(before)}; {hint}")


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {key: leaf for name, part in value.items() for key, leaf in _flat(part, f"{prefix}.{name}").items()}


# -------------------------------------------------------------------------------------------------------------- rules


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""transformers' model types whose training was held against plain transformers (tests/distributed)."""


def check(config: Config) -> None:
    """The rules that bind several keys. Raises ConfigError at the first one that is broken."""
    parallelism, data, train, optim = config.parallelism, config.data, config.train, config.optim
    numbers = architecture(config)
    if numbers.model_type not in FAMILIES:  # others scale or cap logits, fuse projections or place norms in other ways
        raise ConfigError("model.architecture.model_type", numbers.model_type,
                          f"this family can't be trained yet; those that can: {', '.join(FAMILIES)}")
    degrees = numbers.tp_degrees()
    if parallelism.tp not in degrees:
        raise ConfigError(
            "parallelism.tp", parallelism.tp,
            f"must divide the model's {numbers.num_attention_heads} heads, {numbers.num_key_value_heads} key/value heads, "
            f"intermediate size {numbers.intermediate_size} and vocabulary {numbers.vocab_size}; "
            f"degrees that do: {', '.join(map(str, degrees))}",
        )  # fmt: skip
    if parallelism.dp % parallelism.dp_replicate:
        raise ConfigError("parallelism.dp_replicate", parallelism.dp_replicate,
                          f"must divide parallelism.dp={parallelism.dp}; allowed: {_divisors(parallelism.dp)}")
    if config.cluster.num_workers != parallelism.world_size:
        raise ConfigError("cluster.num_workers", config.cluster.num_workers,
                          f"must be tp x dp = {parallelism.tp} x {parallelism.dp} = {parallelism.world_size}; leave it out, it is derived")
    if train.global_batch_size is not None:
        check_global_batch(train.global_batch_size, train.micro_batch_size, parallelism.dp)
    assert data.seq_length is not None
    if data.seq_length > numbers.max_position_embeddings:
        raise ConfigError("data.seq_length", data.seq_length,
                          f"the model has {numbers.max_position_embeddings} positions; give at most that many")
    if data.seq_length % parallelism.tp:
        lower = data.seq_length // parallelism.tp * parallelism.tp
        raise ConfigError("data.seq_length", data.seq_length,
                          f"must be divisible by parallelism.tp={parallelism.tp}, e.g. {lower or parallelism.tp}")
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        raise ConfigError("optim.betas", optim.betas, "must be two numbers in [0, 1), e.g. [0.9,0.95]")
    if train.max_steps is not None:
        check_schedule_length(optim, train.max_steps)
    if data.source in ("hub", "jsonl", "text") and not data.name:
        kinds = {"hub": "a hub id", "jsonl": "a file, a glob or a directory", "text": "a file, a glob or a directory"}
        raise ConfigError("data.name", None, f"is missing: data.source={data.source} needs {kinds[data.source]}")
    if config.cluster.address is not None and config.cluster.kind != "ray":
        raise ConfigError("cluster.address", config.cluster.address,
                          f"only cluster=ray takes an address, not cluster={config.cluster.kind}")
    name = str(config.experiment_name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*", name):
        raise ConfigError("experiment_name", name, "must be one directory name of letters, digits and . _ - = , +")


def check_global_batch(total: int, micro: int, dp: int) -> None:
    """Raises ConfigError unless `total` sequences are whole steps of `dp` ranks with `micro` sequences each."""
    if total % (micro * dp):
        works = [str(n) for n in range(1, total // dp + 1) if total % (n * dp) == 0]
        hint = (f"train.micro_batch_size that works: {', '.join(works)}" if works
                else f"no micro-batch size works; a global batch that does: {math.ceil(total / (micro * dp)) * micro * dp}")
        raise ConfigError("train.global_batch_size", total,
                          f"must be a multiple of train.micro_batch_size x parallelism.dp = {micro} x {dp} = {micro * dp}; {hint}")


def check_schedule_length(optim: Optim, total_steps: int) -> None:
    """Raises ConfigError where a typed warm-up or decay doesn't fit a run of `total_steps` steps."""
    if optim.warmup_steps is not None and optim.warmup_steps > total_steps:
        raise ConfigError("optim.warmup_steps", optim.warmup_steps, f"longer than the run of {total_steps} steps; leave it null for 5 %")
    if optim.schedule == "wsd" and optim.decay_steps is not None and optim.decay_steps + (optim.warmup_steps or 0) > total_steps:
        raise ConfigError("optim.decay_steps", optim.decay_steps, f"warm-up and decay are longer than the run of {total_steps} steps")


def _check_fields(node: Any, prefix: str) -> None:
    """The rules that stand beside single fields."""
    for each in dataclasses.fields(node):
        value, key, rule = getattr(node, each.name), prefix + each.name, each.metadata
        if dataclasses.is_dataclass(value):
            _check_fields(value, key + ".")
        if value is None or not rule:
            continue
        if rule.get("one_of") and value not in rule["one_of"]:
            near = difflib.get_close_matches(str(value), rule["one_of"], n=1)
            raise ConfigError(key, value, f"must be one of {', '.join(rule['one_of'])}" + (f"; did you mean {near[0]}?" if near else ""))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            bounds = [("least", "at least", lambda a, b: a >= b), ("above", "above", lambda a, b: a > b),
                      ("most", "at most", lambda a, b: a <= b), ("below", "below", lambda a, b: a < b)]
            stated = [(words, rule[name]) for name, words, _ in bounds if rule.get(name) is not None]
            if not math.isfinite(value) or any(rule.get(n) is not None and not holds(value, rule[n]) for n, _, holds in bounds):
                raise ConfigError(key, value, "must be " + (" and ".join(f"{words} {bound:g}" for words, bound in stated) or "finite"))


def known_keys(kind: Any = Config, prefix: str = "") -> list[str]:
    """Every key of the schema, dotted."""
    keys: list[str] = []
    for each in dataclasses.fields(kind):
        nested = globals().get(str(each.type)) if str(each.type)[0].isupper() else None
        keys += known_keys(nested, f"{prefix}{each.name}.") if nested else [prefix + each.name]
    return keys


def translate(error: Exception) -> ConfigError:
    """OmegaConf's several lines about a key or a type, as one."""
    key = str(getattr(error, "full_key", None) or "")
    first = str(error).strip().splitlines()[0]
    if "not in '" in first or "is not in struct" in first:
        return unknown_key(key or first)
    if not key and (match := re.search(r"is not a subclass of (\w+)", first)):
        key = match[1].lower()  # the groups' classes are named after them
    inside = [k for k in known_keys() if k.startswith(key + ".")]
    if inside and ("is not a subclass of" in first or "Cannot convert" in first or "Cannot merge" in first):
        return ConfigError(key, None, f"is a group of keys, not a value; give {', '.join(inside)}")
    match = re.search(r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (\w+)", first, re.DOTALL)
    if match:
        wanted = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "bool": "true or false"}
        return ConfigError(key, None if match[1] == "{}" else match[1], f"must be {wanted.get(match[2], match[2].lower())}")
    if "is not a ListConfig" in first or "list index out of range" in first or "Cannot merge ListConfig" in first:
        return ConfigError(key.split("[")[0], None, "must be a whole list, e.g. [0.9,0.95]")
    if "Cannot merge DictConfig" in first:
        return ConfigError(key, None, "must be keys and values, e.g. {NAME: value}")
    if "Cannot convert" in first:
        return ConfigError(key, None, "must be one value, not a list or keys and values")
    if "raised while resolving interpolation" in first:
        first = first.split(": ", 1)[-1].strip("\"'")
    return ConfigError(key, None, first.rstrip("."))


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name that was probably meant."""
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), None)


def unknown_key(key: str, value: object = None) -> ConfigError:
    """The error for a key that the schema doesn't have, with the nearest one that it has."""
    keys = known_keys()
    group, _, last = key.rpartition(".")
    groups = [each.name for each in dataclasses.fields(Config) if each.name not in keys] + ["experiment"]
    near = difflib.get_close_matches(key, [*groups, *(k for k in keys if "." not in k)], n=1)
    if not group and near and near[0] in groups:
        return ConfigError(key, value, f"unknown group; did you mean {near[0]}? groups: {', '.join(groups)}")
    keys = [k for k in keys if not k.startswith("model.recipe.") or group == "model.recipe"]  # not what a user types
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == group]
    names = [k.rpartition(".")[2] for k in keys]

    def close(name: str, among: Sequence[str]) -> list[str]:
        return difflib.get_close_matches(name, among, n=1)

    # the same name in another group, a near one in this group, a near one in any group
    hints = [k for k in keys if k.rpartition(".")[2] == last]
    hints += [f"{group}.{name}".lstrip(".") for name in close(last, siblings)]
    hints += [keys[names.index(name)] for name in close(last, names)] + ([] if group and siblings else close(key, keys))
    if hints:
        return ConfigError(key, value, f"unknown key; did you mean {hints[0]}?")
    if group and siblings:
        return ConfigError(key, value, f"unknown key; {group} has: {', '.join(siblings)}")
    part = "hydra" if group.startswith("hydra") else "job"
    return ConfigError(key, value, f"unknown key; python launch.py --cfg {part} prints all that there are")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _shown(value: object) -> str:
    """A value as one would type it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(_shown, value)) + "]"
    return str(value)


def cache_dir(data: Data) -> Path:
    """Where token files are kept on each node."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(data.cache_dir or f"{base}/tp_trainer").expanduser()
