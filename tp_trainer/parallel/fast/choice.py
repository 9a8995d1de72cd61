"""Which fast paths a run takes: chosen once, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from tp_trainer.config import ConfigError, Parallelism
from tp_trainer.messages import FastPath
from tp_trainer.parallel.fast.measured import DEFAULTS
from tp_trainer.parallel.fast.memory import MASTER, USABLE, Memory
from tp_trainer.parallel.fast.symmetric_memory import possible
from tp_trainer.parallel.mesh import Axis, Mesh

ASKED, NOT_ASKED, UNREACHED = "asked for", "not asked for", "no peer access between the GPUs"
LEANER = "left out, since memory ran out at the first step with it"
# what a leaner start leaves out: each holds memory of its own
HOLDING = ("cuda_graphs", "async_tp", "direct_fsdp", "compute_copies")


@dataclass(frozen=True)
class FastPaths:
    """What is on, what is off, and why; the names are the keys of conf/parallelism.

    Attributes:
        compile: torch.compile of each block.
        cuda_graphs: micro-batches are replayed as CUDA graphs.
        async_tp: matmuls run beside tp's collectives.
        direct_fsdp: FSDP2 gathers and reduces by peer access.
        float8: the matmuls of the blocks' linears are in float8.
        compute_copies: all parameters lie in the dtype of compute too, where dp is 1; off, a
            block's are cast when it is its turn.
    """

    compile: FastPath
    cuda_graphs: FastPath
    async_tp: FastPath
    direct_fsdp: FastPath
    float8: FastPath
    compute_copies: FastPath

    @classmethod
    def choose(
        cls, parallelism: Parallelism, mesh: Mesh, memory: Memory, lean: bool = False
    ) -> FastPaths:
        """Decide for this run; a collective.

        Args:
            memory: what the run needs of its device where dp is 1.
            lean: leave out what holds memory and was not asked for by name.

        Raises:
            ConfigError: asked for, and the hardware can't.
        """
        compiled = _compile(parallelism, mesh.device)
        paths = cls(
            compile=compiled,
            cuda_graphs=_cuda_graphs(parallelism, mesh.device, compiled.on),
            async_tp=_async_tp(parallelism, mesh, compiled.on),
            direct_fsdp=_direct_fsdp(parallelism, mesh),
            float8=_float8(parallelism, mesh.device),
            compute_copies=_compute_copies(parallelism, mesh, memory),
        )
        if lean:
            off = FastPath(False, LEANER)
            paths = replace(paths, **{key: off for key in HOLDING if paths.may_go(key)})
        return paths

    def may_go(self, key: str) -> bool:
        """Whether a leaner start would leave it out."""
        path: FastPath = getattr(self, key)
        return path.on and path.why != ASKED

    def entries(self) -> dict[str, FastPath]:
        """By name, for summary.json and the line at start."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _compile(parallelism: Parallelism, device: torch.device) -> FastPath:
    if parallelism.compile is not None:
        return FastPath(parallelism.compile, ASKED if parallelism.compile else "compile=false")
    return FastPath(device.type == "cuda", "default on GPUs" if device.type == "cuda" else "no GPU")


def _cuda_graphs(parallelism: Parallelism, device: torch.device, compiled: bool) -> FastPath:
    if parallelism.cuda_graphs is False:
        return FastPath(False, "cuda_graphs=false")
    if device.type != "cuda":
        return FastPath(False, "no GPU")
    if not compiled:  # recomputation asks the device for its random state there
        return FastPath(False, "needs compile")
    return FastPath(True, ASKED if parallelism.cuda_graphs else "default on GPUs")


def _async_tp(parallelism: Parallelism, mesh: Mesh, compiled: bool) -> FastPath:
    wanted, size = parallelism.async_tp, mesh.tensor.size
    if wanted is False or size == 1:
        return FastPath(False, "async_tp=false" if wanted is False else "tp is 1")
    if not (parallelism.sequence_parallel and compiled):
        needs = "needs compile" if parallelism.sequence_parallel else "needs sequence_parallel"
        return FastPath(False, "no GPU" if wanted is None and not compiled else needs)
    if mesh.device.type != "cuda" and wanted:
        return FastPath(True, ASKED)  # by collectives
    return _by_peer_access("async_tp", wanted, "a tp group", mesh.tensor, mesh)


def _direct_fsdp(parallelism: Parallelism, mesh: Mesh) -> FastPath:
    wanted = parallelism.direct_fsdp
    if wanted is False or not mesh.sharded:
        return FastPath(False, "direct_fsdp=false" if wanted is False else "dp is 1")
    return _by_peer_access("direct_fsdp", wanted, "a dp group", mesh.shard, mesh)


def _by_peer_access(key: str, wanted: bool | None, group: str, axis: Axis, mesh: Mesh) -> FastPath:
    layout = mesh.tensor.size, mesh.shard.size, mesh.replicate.size
    if wanted is None and layout not in DEFAULTS[key]:
        return FastPath(False, "not the default in this layout")
    if possible(axis, mesh.device):
        return FastPath(True, ASKED if wanted else "fastest in this layout")
    if mesh.device.type != "cuda":
        return FastPath(False, "no GPU")
    if wanted:
        raise ConfigError(
            f"parallelism.{key}",
            True,
            f"no peer access between the GPUs of {group}; leave it null",
        )
    return FastPath(False, UNREACHED)


def _float8(parallelism: Parallelism, device: torch.device) -> FastPath:
    if not parallelism.float8:
        return FastPath(False, NOT_ASKED)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            "parallelism.float8",
            True,
            f"{torch.cuda.get_device_name(device)} can't multiply in float8; H100 and later can",
        )
    return FastPath(True, ASKED)


def _compute_copies(parallelism: Parallelism, mesh: Mesh, memory: Memory) -> FastPath:
    wanted = parallelism.compute_copies
    if mesh.sharded:
        return FastPath(False, "FSDP2 casts what it gathers")
    if memory.compute == MASTER:
        if wanted:
            why = "needs a dtype of compute below float32 (parallelism.param_dtype=bfloat16)"
            raise ConfigError("parallelism.compute_copies", True, f"{why}; leave it null")
        return FastPath(False, "computes in float32")
    if wanted is not None:
        return FastPath(wanted, ASKED if wanted else "compute_copies=false")
    if mesh.device.type != "cuda":
        return FastPath(True, "default where dp is 1")
    there = int(USABLE * torch.cuda.get_device_properties(mesh.device).total_memory)
    need = f"{memory.bytes / 2**30:.1f} of {there / 2**30:.1f} GiB with them"
    return FastPath(memory.bytes <= there, need)
