"""What a run knows: the schema's groups where a value follows from others, with that value in them.

What is null here has a meaning of its own (no limit, not wanted), is settled later than at loading
(`train.global_batch_size` by the driver, `compile`, `param_dtype` and their like by the device), or
isn't read (`data.source` of an export).
"""

from __future__ import annotations

from dataclasses import dataclass

from tp_trainer.config.schema import Data, Model, Optim, Settings
from tp_trainer.config.surroundings import Cluster


@dataclass(kw_only=True)
class ResolvedModel(Model):
    """`architecture` holds all fields of the transformers config, with the overrides in force."""

    weights: str


@dataclass(kw_only=True)
class ResolvedData(Data):
    seq_length: int


@dataclass(kw_only=True)
class ResolvedOptim(Optim):
    lr: float


@dataclass(kw_only=True)
class ResolvedCluster(Cluster):
    num_workers: int


@dataclass(kw_only=True)
class Config(Settings):
    """The configuration of a run. Local paths are absolute."""

    experiment_name: str
    model: ResolvedModel
    data: ResolvedData
    optim: ResolvedOptim
    cluster: ResolvedCluster

    @property
    def run_dir(self) -> str:
        """The run's directory."""
        return f"{self.checkpoint.storage_path.rstrip('/')}/{self.experiment_name}"

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step."""
        train = self.train
        return train.global_batch_size or train.micro_batch_size * self.parallelism.dp
