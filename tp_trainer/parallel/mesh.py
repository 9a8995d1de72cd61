"""The device mesh: named dimensions, and which rank is whose neighbour."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tp_trainer.config import Parallelism


@dataclass(frozen=True)
class Mesh:
    """The process mesh of a run, tp innermost: ranks of one TP group are consecutive.

    `full` has the dimensions (dp, tp), or (dp_replicate, dp, tp) for HSDP, where `dp` then counts the ranks that one
    replica is sharded over.
    """

    device: torch.device
    full: DeviceMesh
    tp_size: int
    dp_size: int  # all data-parallel ranks, replicas included
    tp_rank: int
    dp_rank: int
    dp_group: dist.ProcessGroup  # all data-parallel ranks of this tp rank

    @property
    def tp(self) -> DeviceMesh:
        return self.full["tp"]

    @property
    def fsdp(self) -> DeviceMesh:
        """What FSDP2 takes: (dp) to shard over, or (dp_replicate, dp) to replicate and shard."""
        names = self.full.mesh_dim_names or ()
        return self.full["dp_replicate", "dp"] if "dp_replicate" in names else self.full["dp"]

    @property
    def tp_group_name(self) -> str:
        return self.tp.get_group().group_name


def build_mesh(parallelism: Parallelism, device: torch.device) -> Mesh:
    """The mesh over all ranks of the default process group. Asserts that the world is tp x dp (the driver saw to it)."""
    world, rank = dist.get_world_size(), dist.get_rank()
    assert world == parallelism.world_size, f"{world} ranks for {parallelism.layout}"
    if parallelism.dp_replicate > 1:
        shape = (parallelism.dp_replicate, parallelism.dp // parallelism.dp_replicate, parallelism.tp)
        full = init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp", "tp"))
        dp_group = full["dp_replicate", "dp"]._flatten("dp_all").get_group()
    else:
        full = init_device_mesh(device.type, (parallelism.dp, parallelism.tp), mesh_dim_names=("dp", "tp"))
        dp_group = full["dp"].get_group()
    return Mesh(
        device=device, full=full, tp_size=parallelism.tp, dp_size=parallelism.dp,
        tp_rank=rank % parallelism.tp, dp_rank=rank // parallelism.tp, dp_group=dp_group,
    )  # fmt: skip
