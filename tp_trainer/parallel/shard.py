"""Activation checkpointing, compile, FSDP2 (where dp > 1), in this order, on a model whose
parameters are already split over tp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from tp_trainer.config import Parallelism
from tp_trainer.parallel.fast import FastPaths
from tp_trainer.parallel.mesh import Mesh


def dtypes(parallelism: Parallelism, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """(compute, gradient reduction): what is asked, else bfloat16 on GPUs and float32 on CPU,
    reduced in float32.
    """
    compute = parallelism.param_dtype or ("bfloat16" if device.type == "cuda" else "float32")
    return getattr(torch, compute), getattr(torch, parallelism.reduce_dtype or "float32")


def shard(
    model: nn.Module,
    layers: Sequence[nn.Module],
    tables: Sequence[Sequence[nn.Module]],
    parallelism: Parallelism,
    mesh: Mesh,
    fast: FastPaths,
) -> None:
    """Wrap each layer and the model, in place; with one data-parallel rank there is nothing to
    shard, and no FSDP.

    Args:
        layers: the decoder's blocks, each one FSDP group.
        tables: further groups, in the order of their use (embedding; final norm with head). Tied
            tables must not be listed: they stay in the root's group, together.
    """
    recomputed = _recomputed(selective=parallelism.activation_checkpointing == "selective")
    options = _compile_options(mesh, fast) if fast.compile.on else None
    for layer in layers:
        if parallelism.activation_checkpointing != "none":
            layer.forward = MethodType(recomputed, layer)
        if fast.compile.on:
            layer.compile(options=options)
    if not mesh.sharded:
        place(model, mesh)
        return
    if mesh.device.type == "cuda":
        from tp_trainer.parallel.fast import gradient_copies

        gradient_copies.install()
    compute, reduce = dtypes(parallelism, mesh.device)
    group_options: dict[str, Any] = {
        "mesh": mesh.fsdp,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce),
    }
    for layer in layers:
        fully_shard(layer, **group_options, reshard_after_forward=parallelism.reshard_after_forward)
    for group in tables:
        # the last group is needed again as soon as its forward pass is over
        fully_shard(list(group), **group_options, reshard_after_forward=group is not tables[-1])
    fully_shard(model, **group_options)
    if fast.direct_fsdp.on:
        # not before it is wanted: it knows FSDP2's insides
        from tp_trainer.parallel.fast.fsdp_p2p import use_peer_access

        use_peer_access(
            model,
            [*layers, *(group[0] for group in tables)],
            layers if parallelism.reshard_after_forward else (),
        )
    if tables:
        for module in tables[0]:
            # looking up takes rows; their gradient needs ids alone
            module.set_unshard_in_backward(False)  # type: ignore[operator]


def _compile_options(mesh: Mesh, fast: FastPaths) -> Mapping[str, object] | None:
    # not before they are wanted: they bring the compiler
    if mesh.device.type == "cpu":
        from tp_trainer.parallel.fast.caches import name_instruction_set

        name_instruction_set()
    if mesh.tensor.size == 1:
        return None
    from tp_trainer.parallel.fast.overlap import compile_options

    return compile_options(fast.async_tp.on)


def place(model: nn.Module, mesh: Mesh) -> None:
    """Put each parameter of the meta model on the whole mesh, as FSDP2 would: (dp, tp) where tp
    splits it, else (dp).
    """
    placed: dict[int, nn.Parameter] = {}  # tied parameters must stay one
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in placed:
                own: Any = parameter.detach()
                assert mesh.shard.device_mesh is not None
                where, over_tp = mesh.shard.device_mesh, ()
                if isinstance(own, DTensor):
                    own, where, over_tp = own.to_local(), mesh.full, own.placements
                placed[id(parameter)] = nn.Parameter(
                    DTensor.from_local(
                        own,
                        where,
                        [Replicate(), *over_tp],
                        run_check=False,
                        shape=parameter.shape,
                        stride=parameter.stride(),
                    ),
                    requires_grad=parameter.requires_grad,
                )
            setattr(module, key, placed[id(parameter)])


def _recomputed(selective: bool) -> Callable[..., Any]:
    """A block's forward that forgets its activations and forms them again in the backward pass;
    selective keeps the costly matmuls.

    One function for all blocks, so that torch.compile takes them for the same.
    """
    # torch.compile knows only some context functions; the default itself, given, isn't one of them
    options: dict[str, Any] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if selective else {}
    )

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(
            partial(type(self).forward, self), *args, use_reentrant=False, **options, **kwargs
        )

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
