"""config -> meta model -> parallel model with weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tp_trainer.config import Config, ConfigError, Parallelism
from tp_trainer.models.split import is_gradient_summed, split_table
from tp_trainer.models.weights import draw_weights, find_weights, read_weights
from tp_trainer.parallel import attention, exchange, shared
from tp_trainer.parallel.collectives import TensorRegion
from tp_trainer.parallel.mesh import Mesh
from tp_trainer.parallel.precision import ComputeCopies
from tp_trainer.parallel.replay import MicroStep
from tp_trainer.parallel.shard import dtypes, is_compiled, is_float8, is_replayed, shard
from tp_trainer.parallel.tensor import apply_tensor_parallel

Batch = dict[str, torch.Tensor]


class ParallelModel:
    """A transformers model on the mesh."""

    def __init__(self, module: PreTrainedModel, summed_over_tp: list[nn.Parameter], parallelism: Parallelism, mesh: Mesh) -> None:
        """
        Args:
            module: gives the loss summed over this rank's label tokens; its parameters are float32 DTensors with weights.
            summed_over_tp: parameters replicated over tp of whose gradient each rank has a part of a sum.
        """
        self.module, self.summed_over_tp = module, summed_over_tp
        self.parameters: list[nn.Parameter] = list(module.parameters())
        self.dp_size = mesh.dp_size
        self.copies = None
        if mesh.dp_size == 1:
            low = set(self.parameters) - set(summed_over_tp) if mesh.device.type == "cuda" else set[nn.Parameter]()
            self.copies = ComputeCopies(module, dtypes(parallelism, mesh.device)[0], low)
        self.micro_step = MicroStep(self._forward_backward, self.parameters, is_replayed(parallelism, mesh.device))
        self.before_pass: Callable[[], object] = lambda: None  # called before each pass over the model

    def backward(self, batch: Batch, count: torch.Tensor, index: int, of: int) -> torch.Tensor:
        """Forward and backward pass of a micro-batch.

        Args:
            batch: input_ids and labels, int64 [micro_batch, seq].
            count: float32 scalar on the device, label tokens of the global batch.
            index, of: the step's micro-batches are counted from 0.

        Returns:
            This micro-batch's part of the mean loss, float32 scalar on the device, valid until the next call. The
            gradients are added to what the parameters have; FSDP averages them over dp, which is made up for here.
        """
        self.before_pass()
        if index == 0 and self.copies is not None:
            self.copies.refresh()
            self.copies.adding = of > 1
        return self.micro_step(*self._on_device(batch), count, first=index == 0)

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss summed over a micro-batch's label tokens, float32 scalar."""
        self.before_pass()
        if self.copies is not None:
            self.copies.refresh()
        with self._installed():
            loss = self.module(*self._on_device(batch))
        for module in self.module.modules():
            if isinstance(module, FSDPModule):  # what isn't freed after the forward pass waits for a backward pass
                module.reshard()
        return loss

    def close(self) -> None:
        """Give up what must be gone before the process groups are; nothing can be done with the model afterwards."""
        self.micro_step.close()
        exchange.close()
        shared.close_all()

    def _on_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and labels; from pinned memory, which the host doesn't have to wait for."""
        given = batch["input_ids"], batch["labels"]
        ids, labels = (each.pin_memory() for each in given) if self.device.type == "cuda" else given
        return ids.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def changed(self, copies_too: bool = False) -> None:
        """To be called when parameters were written to; `copies_too`: and their compute_copy, where they have one."""
        if self.copies is not None:
            self.copies.fresh = copies_too

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    def _installed(self) -> AbstractContextManager[None]:
        return self.copies.installed() if self.copies is not None else nullcontext()

    def _forward_backward(self, input_ids: torch.Tensor, labels: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        with self._installed():
            loss = self.module(input_ids, labels) / count
            (loss * self.dp_size).backward()
        return loss.detach()


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
    compiled = is_compiled(parallelism, mesh.device)
    region = TensorRegion(
        mesh.tp_group_name, mesh.tp_size, mesh.tp_rank, parallelism.sequence_parallel, compiled, is_float8(parallelism, mesh.device)
    )  # fmt: skip
    apply_tensor_parallel(model, table, mesh.tp, region)
    model.forward = partial(_loss, model)
    decoder, head, embedding = model.base_model, model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embedding.weight
    shard(model, list(decoder.layers), [] if tied else [[embedding], [decoder.norm, head]], parallelism, mesh)
    model.to_empty(device=mesh.device)
    if tied:  # to_empty makes a tensor of its own for each name
        head.weight = embedding.weight
    _fill_buffers(model, mesh.device)
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            _rotate_once(module)
    if config.model.weights == "pretrained":
        name = str(config.model.name)
        read_weights(model, first_on_node(lambda: find_weights(name)))
    else:
        draw_weights(model, meta_model(config.model.architecture), config.seed, mesh.device)
    model.train()
    summed = [p for n, p in model.named_parameters() if is_gradient_summed(n, table, region.sequence_parallel)]
    return ParallelModel(model, summed, parallelism, mesh)


def _loss(model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """int64 [micro_batch, seq], int64 [micro_batch, seq] -> float32 scalar, summed over the tokens that count.

    Positions are given, since transformers would count them on the residual stream, which is split over the sequence.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    hidden = model.base_model(input_ids=input_ids, position_ids=positions, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden, labels)


def _rotate_once(rotary: nn.Module) -> None:
    """Form a rotary embedding once for each length of rows, of which there is one.

    Some look at the positions first (dynamic, longrope), which waits for the device, as a CUDA graph's capture can't.
    """
    forward: Callable[..., Any] = rotary.forward
    formed: dict[Any, Any] = {}

    def once(x: torch.Tensor, position_ids: torch.Tensor, *layer_type: str, **kwargs: str) -> Any:
        key = (x.dtype, position_ids.shape, layer_type, *kwargs.values())
        if key not in formed:
            formed[key] = forward(x, position_ids, *layer_type, **kwargs)
        return formed[key]

    rotary.forward = once  # type: ignore[assignment]


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
