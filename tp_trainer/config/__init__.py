"""A run's configuration: schema, rules, loading.

Everything here is plain Python: the driver, every worker and every test build the same `Config`
from the same plain dictionary with the same function, `load`. What a user may say is `Settings`,
with nulls; what a run knows is `Config`, in which `load` has filled in what follows from other
keys. The groups that it fills are narrower types there (resolved.py).
"""

from tp_trainer.config.architecture import Architecture, architecture, hub_file
from tp_trainer.config.dotted import DIRECTORY, imported
from tp_trainer.config.errors import (
    ConfigError,
    OutOfMemory,
    Stage,
    Unrecoverable,
    lasting,
    nearest,
    out_of_memory,
    permanent,
    shown,
)
from tp_trainer.config.identity import RUN_LENGTH, check_same_run, check_same_tokens, derived_name
from tp_trainer.config.loading import (
    COMMAND,
    HYDRA,
    SWEEP_WORKERS,
    load,
    plain,
    to_yaml,
    translate,
    unknown_key,
)
from tp_trainer.config.resolved import Config, ResolvedOptim
from tp_trainer.config.rules import FAMILIES, check, check_global_batch, check_schedule_length
from tp_trainer.config.schema import (
    Data,
    Model,
    Optim,
    Parallelism,
    Profile,
    Settings,
    Train,
    cache_dir,
    known_keys,
)
from tp_trainer.config.surroundings import Checkpoint, Cluster, Tracker

__all__ = [
    "COMMAND",
    "DIRECTORY",
    "FAMILIES",
    "HYDRA",
    "RUN_LENGTH",
    "SWEEP_WORKERS",
    "Architecture",
    "Checkpoint",
    "Cluster",
    "Config",
    "ConfigError",
    "Data",
    "Model",
    "Optim",
    "OutOfMemory",
    "Parallelism",
    "Profile",
    "ResolvedOptim",
    "Settings",
    "Stage",
    "Tracker",
    "Train",
    "Unrecoverable",
    "architecture",
    "cache_dir",
    "check",
    "check_global_batch",
    "check_same_run",
    "check_same_tokens",
    "check_schedule_length",
    "derived_name",
    "hub_file",
    "imported",
    "known_keys",
    "lasting",
    "load",
    "nearest",
    "out_of_memory",
    "permanent",
    "plain",
    "shown",
    "to_yaml",
    "translate",
    "unknown_key",
]
