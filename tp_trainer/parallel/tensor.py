"""Applies a split table to a model: DTensor parameters for storage, plain local tensors on the hot path.

Parameters that the table splits become DTensors on the tp mesh; FSDP2 shards them further. Inside a forward the
modules work with their local part (`to_local`), and the collectives stand where the table says that a region begins
or ends. Class, parameter names and state stay transformers' own; only `forward` of single modules is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tp_trainer.parallel.collectives import TensorRegion
from tp_trainer.parallel.loss import linear_cross_entropy


class Role(StrEnum):
    """What a module is to tensor parallelism."""

    COLUMN = "column"  # linear, output features split
    ROW = "row"  # linear, input features split; ends a region
    EMBEDDING = "embedding"  # token embedding, vocabulary split
    HEAD = "head"  # output projection, vocabulary split; computes the loss
    REGION = "region"  # holds column and row modules; its input enters the region
    PER_HEAD = "per_head"  # replicated, but applied to this rank's heads: its gradient is a part of a sum


SPLIT_DIM = {Role.COLUMN: 0, Role.ROW: 1, Role.EMBEDDING: 0, Role.HEAD: 0}


def split_dim(role: Role | None, parameter: str) -> int | None:
    """The dimension along which a module's parameter (`weight`, `bias`) lies over tp; None = replicated."""
    if role is None or (role is Role.ROW and parameter == "bias"):
        return None
    return SPLIT_DIM.get(role)


def apply_tensor_parallel(model: nn.Module, roles: Mapping[str, Role], tp: DeviceMesh, region: TensorRegion) -> None:
    """Split the meta model's parameters and replace the forwards that the roles name, in place.

    Args:
        model: on the meta device.
        roles: full module name -> role.
        tp: the one-dimensional tp mesh.
        region: the same group's way in and out.
    """
    forwards: dict[Role, Callable[..., Any]] = {
        Role.COLUMN: _column, Role.ROW: _row, Role.EMBEDDING: _embedding, Role.HEAD: _head, Role.REGION: _region,
    }  # fmt: skip
    split: dict[int, nn.Parameter] = {}  # tied parameters must stay one
    for name, role in roles.items():
        module = model.get_submodule(name)
        for key, parameter in list(module.named_parameters(recurse=False)):
            dim = split_dim(role, key)
            if dim is not None and not isinstance(parameter, DTensor):
                if id(parameter) not in split:
                    split[id(parameter)] = _split(parameter, tp, dim)
                setattr(module, key, split[id(parameter)])
        if role is Role.REGION:
            module.forward = partial(_region, module.forward, region)
        elif role in forwards:
            module.forward = partial(forwards[role], module, region)


def _split(parameter: nn.Parameter, tp: DeviceMesh, dim: int) -> nn.Parameter:
    assert parameter.is_meta and parameter.shape[dim] % tp.size() == 0, (parameter.shape, dim, tp.size())
    local = parameter.detach().chunk(tp.size(), dim=dim)[0].contiguous()
    return nn.Parameter(DTensor.from_local(local, tp, [Shard(dim)], run_check=False), requires_grad=parameter.requires_grad)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, with its gradient."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _optional_local(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else local(parameter)


def _column(module: nn.Linear, region: TensorRegion, x: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [..., out / tp]"""
    return F.linear(x, local(module.weight), _optional_local(module.bias))


def _row(module: nn.Linear, region: TensorRegion, x: torch.Tensor) -> torch.Tensor:
    """[batch, seq, in / tp] -> residual stream; the bias is added once, after the sum"""
    out = region.leave(F.linear(x, local(module.weight)))
    return out if module.bias is None else out + module.bias


def _embedding(module: nn.Embedding, region: TensorRegion, ids: torch.Tensor) -> torch.Tensor:
    """int64 [batch, seq] -> residual stream: each rank looks up its own rows, the sum over tp has them all"""
    weight = local(module.weight)
    index = ids - region.rank * weight.shape[0]
    mine = (index >= 0) & (index < weight.shape[0])
    rows = F.embedding(torch.where(mine, index, 0), weight)
    return region.leave(rows.masked_fill(~mine[..., None], 0.0))


def _head(module: nn.Linear, region: TensorRegion, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """residual stream, int64 [batch, seq] -> summed loss"""
    whole = region.enter(hidden)
    return linear_cross_entropy(whole.flatten(0, 1), local(module.weight), labels.flatten(), region)


def _region(forward: Callable[..., Any], region: TensorRegion, *args: Any, **kwargs: Any) -> Any:
    """Attention and MLP modules take the residual stream first, or as `hidden_states`."""
    if args:
        return forward(region.enter(args[0]), *args[1:], **kwargs)
    return forward(hidden_states=region.enter(kwargs.pop("hidden_states")), **kwargs)
