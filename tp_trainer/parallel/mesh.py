"""The device mesh by role: which ranks a rank works with, and at what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tp_trainer.config import Parallelism


@dataclass(frozen=True)
class Axis:
    """One role: the ranks that differ from this one in it alone.

    Attributes:
        size: how many they are; 1 where the layout doesn't have the role.
        rank: this one's place among them.
        group, device_mesh: theirs, one-dimensional; None where the layout doesn't have the role.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    device_mesh: DeviceMesh | None = None

    @classmethod
    def of(cls, device_mesh: DeviceMesh) -> Axis:
        """Of a one-dimensional device mesh."""
        group = device_mesh.get_group()
        return cls(device_mesh.size(), device_mesh.get_local_rank(), group, device_mesh)

    def all_reduce(
        self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> None:
        """In place; nothing where there is one rank."""
        if self.size > 1:
            dist.all_reduce(tensor, op=op, group=self.group)


@dataclass(frozen=True)
class Mesh:
    """The process mesh of a run, tensor innermost: ranks of one TP group are consecutive.

    Attributes:
        full: all of it, with the dimensions (dp, tp), or (dp_replicate, dp, tp) for HSDP.
        data: ranks that work on different rows: replicate x shard.
        replicate: ranks that hold the same shards (HSDP).
        shard: ranks that parameters, gradients and optimizer state are sharded over.
        tensor: ranks that share each row's work, a TP group.
    """

    device: torch.device
    full: DeviceMesh
    data: Axis
    replicate: Axis
    shard: Axis
    tensor: Axis

    @property
    def fsdp(self) -> DeviceMesh:
        """What FSDP2 takes: (dp) to shard over, or (dp_replicate, dp) to replicate and shard."""
        return self.full["dp_replicate", "dp"] if self.replicate.size > 1 else self.full["dp"]

    @property
    def sharded(self) -> bool:
        """Whether FSDP2 shards the parameters; otherwise each rank holds its TP part whole."""
        return self.data.size > 1

    def axes(self, tensor: torch.Tensor) -> tuple[Axis, ...]:
        """Those that a tensor is split over, by its placements; none for a plain one."""
        by_name = {"dp_replicate": self.replicate, "dp": self.shard, "tp": self.tensor}
        placements = getattr(tensor, "placements", ())
        names = tensor.device_mesh.mesh_dim_names if placements else ()  # type: ignore[attr-defined]
        split = (
            name for name, place in zip(names, placements, strict=True) if not place.is_replicate()
        )
        return tuple(by_name[name] for name in split)


def build_mesh(parallelism: Parallelism, device: torch.device) -> Mesh:
    """The mesh over all ranks of the default process group. Asserts that the world is tp x dp (the
    driver saw to it).
    """
    world = dist.get_world_size()
    assert world == parallelism.world_size, f"{world} ranks for {parallelism.layout}"
    replicas, tp = parallelism.dp_replicate, parallelism.tp
    if replicas > 1:
        shape, names = (replicas, parallelism.dp // replicas, tp), ("dp_replicate", "dp", "tp")
        full = init_device_mesh(device.type, shape, mesh_dim_names=names)
        replicate = Axis.of(full["dp_replicate"])
        data = Axis.of(full["dp_replicate", "dp"]._flatten("dp_all"))
    else:
        full = init_device_mesh(device.type, (parallelism.dp, tp), mesh_dim_names=("dp", "tp"))
        replicate, data = Axis(), Axis.of(full["dp"])
    return Mesh(device, full, data, replicate, Axis.of(full["dp"]), Axis.of(full["tp"]))
