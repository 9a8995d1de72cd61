"""config -> meta model -> parallel model with weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tp_trainer.config import Config, ConfigError
from tp_trainer.models.split import is_gradient_summed, split_table
from tp_trainer.models.weights import draw_weights, find_weights, read_weights
from tp_trainer.parallel import attention
from tp_trainer.parallel.collectives import TensorRegion
from tp_trainer.parallel.mesh import Mesh
from tp_trainer.parallel.shard import shard
from tp_trainer.parallel.tensor import apply_tensor_parallel


@dataclass(frozen=True)
class ParallelModel:
    """A transformers model on the mesh. `module(input_ids, labels)` gives the loss summed over this rank's label tokens."""

    module: PreTrainedModel
    summed_over_tp: list[nn.Parameter]  # replicated over tp; each rank's gradient is a part of a sum

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.module.parameters())


def meta_model(architecture: dict[str, Any]) -> PreTrainedModel:
    """The transformers model of these config fields, in float32, on the meta device.

    Raises:
        ConfigError: transformers doesn't take the fields.
    """
    fields = {key: value for key, value in architecture.items() if key not in ("model_type", "torch_dtype", "dtype")}
    try:
        config = AutoConfig.for_model(architecture["model_type"], **fields)
    except Exception as error:  # each release checks them with another class of error
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError("model.architecture", None, f"transformers doesn't take these numbers: {reason}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME, dtype=torch.float32)
    model.tie_weights()
    return model


def build_model(config: Config, mesh: Mesh, first_on_node: Callable[[Callable[[], Path]], Path]) -> ParallelModel:
    """The model on the mesh, with weights.

    Args:
        first_on_node: runs a function on the first rank of each node before the others (so that files are fetched once).

    Raises:
        ConfigError: a family or weights that can't be had.
    """
    parallelism = config.parallelism
    model = meta_model(config.model.architecture)
    table = split_table(model, mesh.tp_size)
    region = TensorRegion(mesh.tp_group_name, mesh.tp_size, mesh.tp_rank, parallelism.sequence_parallel)
    apply_tensor_parallel(model, table, mesh.tp, region)
    model.forward = partial(_loss, model)
    decoder, head, embedding = model.base_model, model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    shard(model, list(decoder.layers), [] if tied else [[embedding], [decoder.norm, head]], parallelism, mesh)
    model.to_empty(device=mesh.device)
    if tied:  # to_empty makes a tensor of its own for each name
        head.weight = embedding.weight
    _fill_buffers(model, mesh.device)
    if config.model.weights == "pretrained":
        name = str(config.model.name)
        read_weights(model, first_on_node(lambda: find_weights(name)))
    else:
        draw_weights(model, meta_model(config.model.architecture), config.seed, mesh.device)
    model.train()
    return ParallelModel(model, [p for n, p in model.named_parameters() if is_gradient_summed(n, table, region.sequence_parallel)])


def _loss(model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """int64 [micro_batch, seq], int64 [micro_batch, seq] -> float32 scalar, summed over the tokens that count.

    Positions are given, since transformers would count them on the residual stream, which is split over the sequence.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    hidden = model.base_model(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden, labels)


def _fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers are empty after `to_empty`: scales are kept as numbers too, the rest comes from a new module of the same class."""
    for module in model.modules():
        own = dict(module.named_buffers(recurse=False))
        if "embed_scale" in own:
            own.pop("embed_scale").fill_(module.scalar_embed_scale)
        if own:
            fresh = dict(type(module)(model.config).named_buffers(recurse=False))  # type: ignore[call-arg]
            for name, buffer in own.items():
                buffer.copy_(fresh[name].to(device))


__all__ = ["ParallelModel", "build_model", "meta_model"]
