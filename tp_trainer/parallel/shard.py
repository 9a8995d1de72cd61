"""Activation checkpointing, compile, FSDP2 (where dp > 1), in this order, on a model whose parameters are already split over tp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tp_trainer.config import ConfigError, Parallelism
from tp_trainer.parallel import gradient_copies
from tp_trainer.parallel.mesh import Mesh
from tp_trainer.parallel.overlap import compile_options
from tp_trainer.parallel.precision import place
from tp_trainer.parallel.shared import possible


def dtypes(parallelism: Parallelism, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """(compute, gradient reduction): what is asked, else bfloat16 on GPUs and float32 on CPU, reduced in float32."""
    compute = parallelism.param_dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return getattr(torch, compute), getattr(torch, parallelism.reduce_dtype or "float32")


def is_compiled(parallelism: Parallelism, device: torch.device) -> bool:
    return parallelism.compile if parallelism.compile is not None else device.type == "cuda"


def is_replayed(parallelism: Parallelism, device: torch.device) -> bool:
    """Whether micro-batches become CUDA graphs. Not without compile, where recomputation asks the device for its random state."""
    wanted = parallelism.cuda_graphs is not False
    return wanted and device.type == "cuda" and is_compiled(parallelism, device)


def is_float8(parallelism: Parallelism, device: torch.device) -> bool:
    if parallelism.float8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError("parallelism.float8", True, f"{torch.cuda.get_device_name(device)} can't multiply in float8; H100 and later can")
    return parallelism.float8


def is_async_tp(parallelism: Parallelism, mesh: Mesh) -> bool:
    """Whether products go on beside tensor parallelism's exchange; a collective. Run at tp2_dp1 only, and not the default elsewhere."""
    default = (mesh.tp_size, mesh.dp_size) == (2, 1)
    wanted = default if parallelism.async_tp is None else parallelism.async_tp
    if not (wanted and parallelism.sequence_parallel and mesh.tp_size > 1 and is_compiled(parallelism, mesh.device)):
        return False
    if possible(mesh.tp.get_group(), mesh.device):
        return True
    if parallelism.async_tp and mesh.device.type == "cuda":
        raise ConfigError("parallelism.async_tp", True, "the GPUs of a tp group don't reach one another's memory; leave it null")
    return bool(parallelism.async_tp)  # on CPU by collectives


def is_direct(parallelism: Parallelism, mesh: Mesh) -> bool:
    """Whether FSDP2 exchanges without copies; a collective. Only between GPUs that reach one another; the default where it was timed."""
    default = (mesh.tp_size, mesh.dp_size, parallelism.dp_replicate) == (1, 2, 1)
    wanted = default if parallelism.direct_fsdp is None else parallelism.direct_fsdp
    if not wanted or mesh.dp_size == 1:
        return False
    if possible(mesh.full["dp"].get_group(), mesh.device):
        return True
    if parallelism.direct_fsdp and mesh.device.type == "cuda":
        raise ConfigError("parallelism.direct_fsdp", True, "the GPUs of a dp group don't reach one another's memory; leave it null")
    return False


def shard(
    model: nn.Module, layers: Sequence[nn.Module], tables: Sequence[Sequence[nn.Module]], parallelism: Parallelism, mesh: Mesh
) -> None:
    """Wrap each layer and the model, in place; with one data-parallel rank there is nothing to shard, and no FSDP.

    Args:
        layers: the decoder's blocks, each one FSDP group.
        tables: further groups, in the order of their use (embedding; final norm with head). Tied tables must not be
            listed: they stay in the root's group, together.
    """
    recomputed = _recomputed(selective=parallelism.activation_checkpointing == "selective")
    options = compile_options(is_async_tp(parallelism, mesh)) if mesh.tp_size > 1 else None
    for layer in layers:
        if parallelism.activation_checkpointing != "none":
            layer.forward = MethodType(recomputed, layer)
        if is_compiled(parallelism, mesh.device):
            layer.compile(options=options)
    if mesh.dp_size == 1:
        place(model, mesh)
        return
    if mesh.device.type == "cuda":
        gradient_copies.install()
    compute, reduce = dtypes(parallelism, mesh.device)
    group_options: dict[str, Any] = {"mesh": mesh.fsdp, "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)}
    for layer in layers:
        fully_shard(layer, **group_options, reshard_after_forward=parallelism.reshard_after_forward)
    for group in tables:
        # the last group is needed again as soon as its forward pass is over
        fully_shard(list(group), **group_options, reshard_after_forward=group is not tables[-1])
    fully_shard(model, **group_options)
    if is_direct(parallelism, mesh):
        from tp_trainer.parallel.direct import exchange_directly  # not before it is wanted: it knows FSDP2's insides

        exchange_directly(model, [*layers, *(group[0] for group in tables)], layers if parallelism.reshard_after_forward else ())
    if tables:
        for module in tables[0]:
            module.set_unshard_in_backward(False)  # type: ignore[operator]  # looking up takes rows; their gradient needs ids alone


def _recomputed(selective: bool) -> Callable[..., Any]:
    """A block's forward that forgets its activations and forms them again in the backward pass; selective keeps the costly products.

    One function for all blocks, so that torch.compile takes them for the same.
    """
    # torch.compile knows only some context functions; the default itself, given, isn't one of them
    options: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(type(self).forward, self), *args, use_reentrant=False, **options, **kwargs)

    return forward


_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
}


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
