"""Applies a split table to a model: DTensor parameters for storage, plain local tensors on the hot path.

Parameters that the table splits become DTensors on the tp mesh; FSDP2 shards them further. Inside a forward the
modules work with their local part (`to_local`), and the collectives stand where the table says that a region begins
or ends. Class, parameter names and state stay transformers' own; only `forward` of single modules is replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tp_trainer.parallel import float8
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
    FUSED = "fused"  # linear, several projections in one, output features split; each rank takes its part of each of them
    SHARED_HEADS = "shared_heads"  # linear of fewer heads than ranks: replicated, each rank computes the one that it needs
    NORM = "norm"  # RMS norm over features that are split


@dataclass(frozen=True)
class Part:
    """One module's entry in the split table."""

    role: Role
    segments: tuple[tuple[int, int], ...] = ()  # FUSED, SHARED_HEADS: (features, heads) of each projection, in their order
    heads: tuple[int, int] | None = None  # REGION: (heads, key/value heads) that the module is to believe in
    scale: float = 1.0  # HEAD: logits are multiplied by it
    softcap: float | None = None  # HEAD: then squashed to +- this


SPLIT_DIM = {Role.COLUMN: 0, Role.FUSED: 0, Role.NORM: 0, Role.ROW: 1, Role.EMBEDDING: 0, Role.HEAD: 0}


def split_dim(part: Part | None, parameter: str) -> int | None:
    """The dimension along which a module's parameter (`weight`, `bias`) lies over tp; None = replicated."""
    if part is None or (part.role is Role.ROW and parameter == "bias"):
        return None
    return SPLIT_DIM.get(part.role)


def apply_tensor_parallel(model: nn.Module, table: Mapping[str, Part], tp: DeviceMesh, region: TensorRegion) -> None:
    """Split the meta model's parameters and replace the forwards that the table names, in place.

    Args:
        model: on the meta device.
        table: full module name -> its part.
        tp: the one-dimensional tp mesh.
        region: the same group's way in and out.
    """
    functions: dict[Role, Callable[..., Any]] = {
        Role.COLUMN: _column, Role.ROW: _row, Role.EMBEDDING: _embedding, Role.FUSED: _fused, Role.SHARED_HEADS: _shared_heads,
        Role.NORM: _norm, Role.HEAD: _head, Role.REGION: _region,
    }  # fmt: skip
    # torch.compile takes a bound method for the same in all layers, where other callables would make it compile each anew
    forwards = {role: _as_method(function) for role, function in functions.items()}
    split: dict[int, nn.Parameter] = {}  # tied parameters must stay one
    for name, part in table.items():
        module: Any = model.get_submodule(name)
        for key, parameter in list(module.named_parameters(recurse=False)):
            dim = split_dim(part, key)
            if dim is not None and not isinstance(parameter, DTensor):
                if id(parameter) not in split:
                    split[id(parameter)] = _split(parameter, tp, dim)
                setattr(module, key, split[id(parameter)])
        if part.role is Role.REGION and part.heads is not None:
            _believe(module, *part.heads)
        if part.role in forwards:
            module.tp_region, module.tp_part = region, part
            module.forward = MethodType(forwards[part.role], module)
    for name, part in table.items():
        if part.role is Role.REGION:
            module = model.get_submodule(name)
            taking = [each for each in module.children() if isinstance(each, nn.Linear) and _role(each) is not Role.ROW]
            module.tp_in_float8 = region.float8 and region.sequence_parallel and all(map(_in_float8, taking))


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, self.tp_region, self.tp_part, *args, **kwargs)

    return forward


def _believe(module: Any, heads: int, kv_heads: int) -> None:
    """Modules that cut their projections apart by the config's numbers get a config with this rank's."""
    module.config = copy.copy(module.config)
    module.config.num_attention_heads = heads
    module.num_key_value_heads = kv_heads


def _split(parameter: nn.Parameter, tp: DeviceMesh, dim: int) -> nn.Parameter:
    """A DTensor of the parameter; where the degree doesn't divide (a vocabulary), the last ranks hold less."""
    assert parameter.is_meta
    whole = parameter.detach()
    empty = whole.narrow(dim, 0, 0)
    chunks = [*whole.chunk(tp.size(), dim=dim), *[empty] * tp.size()]
    local = DTensor.from_local(
        chunks[tp.get_local_rank()].contiguous(), tp, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return nn.Parameter(local, requires_grad=parameter.requires_grad)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, with its gradient."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _optional_local(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else local(parameter)


def _linear(region: TensorRegion, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return float8.linear(x, weight, bias, region.low) if region.float8 else F.linear(x, weight, bias)


def _column(module: nn.Linear, region: TensorRegion, part: Part, x: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [..., out / tp]"""
    return _linear(region, x, local(module.weight), _optional_local(module.bias))


def _row(module: nn.Linear, region: TensorRegion, part: Part, x: torch.Tensor) -> torch.Tensor:
    """[batch, seq, in / tp] -> residual stream; the bias is added once, after the sum"""
    weight = local(module.weight)
    if region.float8 and region.sequence_parallel and float8.fits(*x.flatten(0, -2).shape, *weight.shape):
        out = float8.linear_and_leave(x, weight, region.group, region.size)
    else:
        out = region.leave(_linear(region, x, weight, None))
    return out if module.bias is None else out + module.bias


def _own(x: torch.Tensor, region: TensorRegion, part: Part, dim: int) -> list[torch.Tensor]:
    """This rank's part of each projection that lies in `x` along `dim`: its heads, or the one head that it shares."""
    own = []
    for piece, (features, heads) in zip(x.split([features for features, _ in part.segments], dim=dim), part.segments, strict=True):
        if heads % region.size == 0:
            own.append(piece.chunk(region.size, dim=dim)[region.rank])
        else:
            own.append(piece.narrow(dim, region.rank * heads // region.size * (features // heads), features // heads))
    return own


def _fused(module: nn.Linear, region: TensorRegion, part: Part, x: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [..., this rank's part of each projection]

    Rows lie over tp as they stand, so that a checkpoint doesn't depend on the degree; the price is a gather of the output.
    """
    return torch.cat(_own(region.gather_features(_column(module, region, part, x)), region, part, -1), dim=-1)


def _shared_heads(module: nn.Linear, region: TensorRegion, part: Part, x: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [..., head_dim]: the head that this rank's queries attend to"""
    bias = None if module.bias is None else _own(module.bias, region, part, 0)[0]
    return F.linear(x, _own(module.weight, region, part, 0)[0], bias)


def _norm(module: Any, region: TensorRegion, part: Part, x: torch.Tensor) -> torch.Tensor:
    """RMS norm of [..., features / tp] over all features"""
    wide = x.float()
    mean = region.sum(wide.square().sum(-1, keepdim=True)) / (wide.shape[-1] * region.size)
    return (local(module.weight) * (wide * torch.rsqrt(mean + module.variance_epsilon))).to(x.dtype)


def _first_row(vocabulary: int, region: TensorRegion) -> int:
    """The id of this rank's first row of a vocabulary-split table."""
    return region.rank * -(-vocabulary // region.size)


def _embedding(module: Any, region: TensorRegion, part: Part, ids: torch.Tensor) -> torch.Tensor:
    """int64 [batch, seq] -> residual stream: each rank looks up its own rows, the sum over tp has them all"""
    region.batch = ids.shape[0]
    weight = local(module.weight)
    index = ids - _first_row(module.num_embeddings, region)
    mine = (index >= 0) & (index < weight.shape[0])
    rows = F.embedding(torch.where(mine, index, 0), weight)
    if module.padding_idx is not None:  # that row gets no gradient, as nn.Embedding has it
        rows = torch.where((ids == module.padding_idx)[..., None], rows.detach(), rows)
    out = region.leave(rows.masked_fill(~mine[..., None], 0.0))
    return out * module.embed_scale.to(out.dtype) if hasattr(module, "embed_scale") else out


def _head(module: nn.Linear, region: TensorRegion, part: Part, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """residual stream, int64 [batch, seq] -> summed loss"""
    whole = region.enter(hidden if part.scale == 1.0 else hidden * part.scale).flatten(0, 1)
    first = _first_row(module.out_features, region)
    return linear_cross_entropy(whole, local(module.weight), labels.flatten(), region, first, part.softcap, region.compiled)


def _region(module: nn.Module, region: TensorRegion, part: Part, *args: Any, **kwargs: Any) -> Any:
    """Attention and MLP modules take the residual stream first, or as `hidden_states`."""
    x, *rest = args or (kwargs.pop("hidden_states"),)
    if not (module.tp_in_float8 and float8.fits(x.shape[1] * region.size)):
        return type(module).forward(module, region.enter(x), *rest, **kwargs)
    region.low = float8.gather(x, region.batch, region.group, region.size)
    out = type(module).forward(module, region.low.whole, *rest, **kwargs)
    region.low = None
    return out


def _role(module: nn.Module) -> Role | None:
    part = getattr(module, "tp_part", None)
    return None if part is None else part.role


def _in_float8(linear: nn.Module) -> bool:
    return _role(linear) in (Role.COLUMN, Role.FUSED) and float8.fits(*local(linear.weight).shape)  # type: ignore[arg-type]
