"""A run's configuration: schema, rules, loading.

Everything here is plain Python: the driver, every worker and every test build the same `Config` from the same plain
dictionary with the same function, `load`. Values that are null in the files and follow from others are filled in by it.
"""

from tp_trainer.config.architecture import Architecture, architecture, hub_file
from tp_trainer.config.errors import ConfigError, Unrecoverable, nearest, shown
from tp_trainer.config.identity import RUN_LENGTH, check_same_run, check_same_tokens, derived_name
from tp_trainer.config.loading import HYDRA, SWEEP_WORKERS, load, plain, to_yaml, translate, unknown_key
from tp_trainer.config.rules import FAMILIES, check_global_batch, check_schedule_length
from tp_trainer.config.schema import (
    Checkpoint,
    Cluster,
    Config,
    Data,
    Model,
    Optim,
    Parallelism,
    Profile,
    Tracker,
    Train,
    cache_dir,
    known_keys,
)

__all__ = [
    "FAMILIES", "HYDRA", "RUN_LENGTH", "SWEEP_WORKERS", "Architecture", "Checkpoint", "Cluster", "Config", "ConfigError", "Data", "Model",
    "Optim", "Parallelism", "Profile", "Tracker", "Train", "Unrecoverable", "architecture", "cache_dir", "check_global_batch",
    "check_same_run", "check_same_tokens", "check_schedule_length", "derived_name", "hub_file", "known_keys", "load", "nearest", "plain",
    "shown", "to_yaml", "translate", "unknown_key",
]  # fmt: skip
