"""config -> meta model -> parallel model with weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import unwrap
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tp_trainer.config import Config, Parallelism, Unrecoverable
from tp_trainer.models.description import described, meta_model, with_buffers
from tp_trainer.models.files import Stored, matched, stored_tensors
from tp_trainer.models.model import ParallelModel, looks_at_positions
from tp_trainer.models.split import is_gradient_summed, split_table
from tp_trainer.models.weights import draw_weights, read_weights
from tp_trainer.parallel.collectives import TensorRegion
from tp_trainer.parallel.fast import FastPaths, Memory
from tp_trainer.parallel.fast.float8 import Float8Region, gather_in_float8
from tp_trainer.parallel.mesh import Mesh
from tp_trainer.parallel.shard import dtypes, shard
from tp_trainer.parallel.tensor import Part, apply_tensor_parallel

OnFirst = Callable[[Callable[[], dict[str, Stored]]], dict[str, Stored]]


def build_model(
    config: Config,
    mesh: Mesh,
    first_on_node: OnFirst,
    trainable: Callable[[str], bool] = lambda name: True,
    lean: bool = False,
) -> ParallelModel:
    """The model on the mesh, with weights.

    Args:
        first_on_node: runs a function on the first rank of each node before the others (so that
            files are fetched once).
        trainable: of a parameter's name; others get no gradient and are held in the dtype of
            compute.
        lean: without the fast paths that hold memory (see FastPaths.choose).

    Raises:
        ConfigError: a family or weights that can't be had, or a fast path that the hardware can't.
    """
    parallelism, pretrained = config.parallelism, config.model.weights == "pretrained"
    stored = first_on_node(lambda: stored_tensors(config.model)) if pretrained else None
    model = described(config.model, stored)
    places = matched(stored, model, str(config.model.name)) if stored is not None else None
    _freeze(model, trainable, dtypes(parallelism, mesh.device)[0])
    table = split_table(model, mesh.tensor.size)
    paths = FastPaths.choose(parallelism, mesh, _needed(model, table, config, mesh), lean)
    region = _distribute(model, table, parallelism, mesh, paths)
    if places is not None:
        read_weights(model, places)
    else:
        draw_weights(model, meta_model(config.model.architecture), config.seed, mesh.device)
    model.train()
    summed = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and is_gradient_summed(name, table, region.sequence_parallel)
    ]
    return ParallelModel(model, summed, parallelism, mesh, paths)


def _needed(model: PreTrainedModel, table: dict[str, Part], config: Config, mesh: Mesh) -> Memory:
    """What a rank holds where dp is 1."""
    parallelism, train = config.parallelism, config.train
    return Memory.of(
        model,
        list(model.base_model.layers),
        table,
        mesh.tensor.size,
        train.micro_batch_size * config.data.seq_length,
        recomputed=parallelism.activation_checkpointing == "full",
        accumulated=config.global_batch_size > train.micro_batch_size * mesh.data.size,
        compute=dtypes(parallelism, mesh.device)[0],
    )


def _distribute(
    model: PreTrainedModel,
    table: dict[str, Part],
    parallelism: Parallelism,
    mesh: Mesh,
    paths: FastPaths,
) -> TensorRegion:
    """Split and shard the meta model, in place, and give it memory: parameters without values,
    buffers with theirs.
    """
    tensor = mesh.tensor
    assert tensor.group is not None and tensor.device_mesh is not None
    region = (Float8Region if paths.float8.on else TensorRegion)(
        tensor.group.group_name,
        tensor.size,
        tensor.rank,
        parallelism.sequence_parallel,
        paths.compile.on,
    )
    apply_tensor_parallel(model, table, tensor.device_mesh, region)
    if isinstance(region, Float8Region):
        gather_in_float8(model, table, region)
    model.forward = partial(_forward, model)
    decoder, head = model.base_model, model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    tied = head.weight is embedding.weight
    # the final norm, under whatever name
    others = [
        each
        for each in decoder.children()
        if each is not embedding and each is not decoder.layers and list(each.parameters())
    ]
    tables = [] if tied else [[embedding], [*others, head]]
    shard(model, list(decoder.layers), tables, parallelism, mesh, paths)
    model.to_empty(device=mesh.device)
    if tied:  # to_empty makes a tensor of its own for each name
        head.weight = embedding.weight
    _fill_buffers(model, mesh.device)
    for module in model.modules():
        if looks_at_positions(module):
            _look_once(module, model)
    return region


def _freeze(model: PreTrainedModel, trainable: Callable[[str], bool], dtype: torch.dtype) -> None:
    """Parameters of the meta model that aren't trained: no gradient, in the dtype of compute."""
    frozen = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        for name, parameter in model.named_parameters()
        if not trainable(name)
    }
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in frozen:
                setattr(module, key, frozen[id(parameter)])


def _forward(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor | None,
    position_ids: torch.Tensor,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """A Batch's tensors, int64 [rows, seq] -> float32 scalar, the loss summed over the labels that
    count; without labels float32 [rows, seq, vocab], the logits.
    """
    model.tp_packed = document_ids is not None
    if model.tp_packed and not model.tp_family.passes_documents:
        raise Unrecoverable(f"{model.config.model_type} can't keep the documents of a row apart")
    hidden = model.base_model(
        input_ids=input_ids, position_ids=position_ids, document_ids=document_ids, use_cache=False
    ).last_hidden_state
    return model.get_output_embeddings()(hidden, labels)


def _look_once(rotary: nn.Module, model: Any) -> None:
    """Some rotary embeddings (dynamic, longrope) look at the positions to choose frequencies, which
    waits for the device, as a CUDA graph's capture can't. Rows of one document each have the same
    positions if they have the same length: there they look once.
    """
    looking, plain = rotary.forward, unwrap(type(rotary).forward)
    looked_at: dict[Any, torch.Size] = {}  # by layer type: what its frequencies belong to

    def forward(x: torch.Tensor, position_ids: torch.Tensor, *kind: str, **named: str) -> Any:
        layer_type = (*kind, *named.values())
        if not model.tp_packed and looked_at.get(layer_type) == position_ids.shape:
            return plain(rotary, x, position_ids, *kind, **named)
        looked_at[layer_type] = position_ids.shape
        return looking(x, position_ids, *kind, **named)

    rotary.forward = forward  # type: ignore[assignment]


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers are empty after `to_empty`: scales are kept as numbers too, the rest comes from a new
    module of the same class, or, where that takes more than the config, from a new model.
    """
    twin: nn.Module | None = None
    for name, module in model.named_modules():
        own = dict(module.named_buffers(recurse=False))
        for buffer, attribute in model.tp_family.scales.items():
            if buffer in own:
                own.pop(buffer).fill_(getattr(module, attribute))
        if own:
            try:
                made = type(module)(model.config)  # type: ignore[call-arg]
            except Exception:  # whatever a constructor makes of a config that it doesn't expect
                twin = twin or with_buffers(model.config)
                made = twin.get_submodule(name)
            fresh = dict(made.named_buffers(recurse=False))
            for key, buffer in own.items():
                buffer.copy_(fresh[key].to(device))


__all__ = ["ParallelModel", "build_model"]
