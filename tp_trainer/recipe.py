"""How a run is put together from its config: the same for training, bench, verify and the tests'
ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from tp_trainer.checkpoint.saving import Checkpoints
from tp_trainer.config import Config
from tp_trainer.data import DataStream, open_data
from tp_trainer.models.build import build_model
from tp_trainer.models.model import ParallelModel
from tp_trainer.optim import AdamW, build_optimizer
from tp_trainer.parallel.mesh import Mesh, build_mesh

T = TypeVar("T")


class Ranks(Protocol):
    """What the recipe asks of a rank and of the others; `session.Rank` is one."""

    @property
    def device(self) -> torch.device: ...

    @property
    def rank(self) -> int: ...

    def agree(self, action: Callable[[], T]) -> T:
        """Run an action on every rank; an error of one that is the user's is raised on all."""

    def first(self, action: Callable[[], T]) -> T:
        """Run an action on the first rank of each node; its others get what it gave."""


@dataclass
class Run:
    """The parts of a run on this rank."""

    config: Config
    mesh: Mesh
    model: ParallelModel
    data: DataStream
    optimizer: AdamW

    def checkpoints(self, permitted: Callable[[], bool]) -> Checkpoints:
        """What saves and restores the run; a collective.

        Args:
            permitted: whether this run may still publish; asked on rank 0.
        """
        keep = self.config.checkpoint
        return Checkpoints(
            self.config.run_dir,
            keep.keep_last,
            self.model.module,
            self.optimizer,
            self.mesh.device,
            keep_every=keep.keep_every,
            keep_best=keep.keep_best,
            asynchronous=keep.asynchronous,
            permitted=permitted,
        )


def build(
    config: Config,
    ranks: Ranks,
    *,
    tokenizer: str,
    lean: bool = False,
    trainable: Callable[[str], bool] = lambda name: True,
    built: Callable[[ParallelModel], None] = lambda model: None,
) -> Run:
    """Mesh, model, data and optimizer, in this order; a collective.

    Args:
        tokenizer: as the driver chose it; "none": random tokens.
        lean, trainable: see `models.build_model`.
        built: called when the model is there, before the data.

    Raises:
        ConfigError: refused; the same on every rank.
    """
    mesh = build_mesh(config.parallelism, ranks.device)
    model = ranks.agree(lambda: build_model(config, mesh, ranks.first, trainable, lean))
    built(model)
    data = ranks.agree(
        lambda: open_data(
            config,
            tokenizer=tokenizer,
            dp_rank=mesh.data.rank,
            dp_size=mesh.data.size,
            first_on_node=ranks.first,
        )
    )
    optimizer = build_optimizer(config.optim, model.parameter_groups())
    torch.manual_seed(config.seed + 1 + ranks.rank)  # of dropout; a restore brings back its own
    return Run(config, mesh, model, data, optimizer)
