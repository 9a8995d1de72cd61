"""What makes a run the same run: the choices that shape its numbers, its derived name, what a resume may not change."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tp_trainer.config.errors import ConfigError, shown
from tp_trainer.config.schema import Config

RUN_LENGTH = ("num_epochs", "max_steps_per_epoch", "max_steps")
INTERVALS = ("log_interval", "eval_interval", "eval_batches", "drift_interval", "profile", "max_skipped_steps")


def choices(config: Config) -> dict[str, Any]:
    """Every choice that shapes the numbers of a run, by group: run length, intervals and where it runs left out."""
    values = asdict(config)
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
                raise ConfigError(key, value, f"the run in {config.run_dir} was started with {shown(before)}; {hint}")


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {key: leaf for name, part in value.items() for key, leaf in _flat(part, f"{prefix}.{name}").items()}
