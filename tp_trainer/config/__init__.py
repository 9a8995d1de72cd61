"""A run's configuration: schema, rules, loading.

Everything here is plain Python: the driver, every worker and every test build the same `Config`
from the same plain dictionary with the same function, `load`. What a user may say is `Settings`,
with nulls; what a run knows is `Config`, in which `load` has filled in what follows from other
keys. The groups that it fills are narrower types there (resolved.py).
"""

from tp_trainer.config.architecture import Architecture, architecture
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
from tp_trainer.config.hub import hub_file
from tp_trainer.config.identity import (
    RUN_LENGTH,
    check_same_run,
    check_same_tokens,
    derived_name,
    is_derived,
    paths_alone,
)
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
    text_keys,
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
    "is_derived",
    "known_keys",
    "lasting",
    "load",
    "nearest",
    "out_of_memory",
    "paths_alone",
    "permanent",
    "plain",
    "shown",
    "text_keys",
    "to_yaml",
    "translate",
    "unknown_key",
]
