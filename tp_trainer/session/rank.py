"""A rank: its device, its place on its node, and agreement with the other ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import ray.train
import torch
import torch.distributed as dist
from ray.actor import ActorHandle

from tp_trainer.checkpoint.store import Store, launch_file
from tp_trainer.config import Config, ConfigError
from tp_trainer.data import DataStream
from tp_trainer.messages import Message

T = TypeVar("T")
Progress: TypeAlias = ActorHandle  # the driver's, which messages are pushed to


class Rank:
    """One process of the run: its device, its place on its node, and agreement with the others."""

    def __init__(self, config: Config) -> None:
        context = ray.train.get_context()
        self.rank, self.local_rank = context.get_world_rank(), context.get_local_rank()
        self.node_rank, self.storage = context.get_node_rank(), context.get_storage()
        self.local_world = context.get_local_world_size()
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if config.cluster.device == "gpu"
            else torch.device("cpu")
        )
        if self.device.type == "cuda":
            # of this thread; what runs on the default one can't be captured in a graph
            torch.cuda.set_stream(torch.cuda.Stream())
            # as torchtitan: less is lost between blocks
            if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
                torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.local_world))
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

    def agree(self, action: Callable[[], T]) -> T:
        """Run an action on every rank; where any raised a ConfigError, every rank raises the first
        of them.
        """
        result, error = None, None
        try:
            result = action()
        except ConfigError as raised:
            error = (raised.key, raised.value, raised.message)
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        for each in errors:
            if each is not None:
                raise ConfigError(*each)
        return result  # type: ignore[return-value]  # set, since no rank raised

    def first(self, action: Callable[[], T]) -> T:
        """Run an action on the first rank of each node; its others get what it gave."""
        result = self.agree(lambda: action() if self.local_rank == 0 else None)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (self.node_rank, result) if self.local_rank == 0 else None)
        of_node: dict[int, T] = dict(each for each in gathered if each is not None)
        return of_node[self.node_rank]

    def push(self, progress: Progress, message: Message) -> None:
        """Tell the driver something, from rank 0 alone."""
        if self.rank == 0:
            progress.push.remote(message)

    def check_alike(self, data: DataStream) -> None:
        """Raises ConfigError, on every rank, where nodes hold different data under one name."""
        tokens: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(tokens, (data.train.identity, data.validation.identity))
        if len(set(tokens)) > 1:
            reason = "the nodes hold different data under this name; give a path that they share"
            raise ConfigError("data.name", data.found.get("name"), reason)

    def check(self, config: Config, launch: str) -> None:
        """Raises ConfigError where this node can't take part."""
        if not Store(config.run_dir).exists(launch_file(launch)):
            raise ConfigError(
                "checkpoint.storage_path",
                config.checkpoint.storage_path,
                f"node {socket.gethostname()} doesn't see what the driver wrote there; give a path"
                " that all nodes share",
            )
        if self.local_world % config.parallelism.tp:
            raise ConfigError(
                "parallelism.tp",
                config.parallelism.tp,
                f"node {socket.gethostname()} has {self.local_world} workers: a TP group must lie"
                " within one node",
            )
