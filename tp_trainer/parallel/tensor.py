"""Applies a split table to a model: DTensor parameters for storage, plain local tensors on the hot
path.

Parameters that the table splits become DTensors on the tp mesh; FSDP2 shards them further. Inside a
forward the modules work with their local part (`to_local`), and the collectives stand where the
table says that a region begins or ends. Class, parameter names and state stay transformers' own;
only `forward` of single modules is replaced.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from enum import StrEnum
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tp_trainer.parallel.collectives import TensorRegion
from tp_trainer.parallel.loss import capped, linear_cross_entropy


class Role(StrEnum):
    """What a module is to tensor parallelism."""

    COLUMN = "column"  # linear, output features split
    ROW = "row"  # linear, input features split; ends a region
    EMBEDDING = "embedding"  # token embedding, vocabulary split
    HEAD = "head"  # output projection, vocabulary split; computes the loss
    REGION = "region"  # holds column and row modules; its input enters the region
    # replicated, but applied to this rank's heads: its gradient is a part of a sum
    PER_HEAD = "per_head"
    # linear, several projections in one, output features split; each rank takes its part of each of
    # them
    FUSED = "fused"
    # linear of fewer heads than ranks: replicated, each rank computes the one that it needs
    SHARED_HEADS = "shared_heads"
    NORM = "norm"  # RMS norm over features that are split
    REPLICATED = "replicated"  # with all within it: whole sequences, every rank computes the same


@dataclass(frozen=True)
class Part:
    """One module's entry in the split table."""

    role: Role
    # FUSED, SHARED_HEADS: (features, heads) of each projection, in their order
    segments: tuple[tuple[int, int], ...] = ()
    # REGION: (heads, key/value heads) that the module is to believe in
    heads: tuple[int, int] | None = None
    scale: float = 1.0  # HEAD: logits are multiplied by it
    softcap: float | None = None  # HEAD: then squashed to +- this
    scales: tuple[str, ...] = ()  # EMBEDDING: buffers that what is looked up is multiplied by


SPLIT_DIM = {
    Role.COLUMN: 0,
    Role.FUSED: 0,
    Role.NORM: 0,
    Role.ROW: 1,
    Role.EMBEDDING: 0,
    Role.HEAD: 0,
}


def split_dim(part: Part | None, parameter: str) -> int | None:
    """The dimension along which a module's parameter (`weight`, `bias`) lies over tp; None =
    replicated.
    """
    if part is None or (part.role is Role.ROW and parameter == "bias"):
        return None
    return SPLIT_DIM.get(part.role)


def apply_tensor_parallel(
    model: nn.Module, table: Mapping[str, Part], tp: DeviceMesh, region: TensorRegion
) -> None:
    """Split the meta model's parameters and replace the forwards that the table names, in place.

    Args:
        model: on the meta device.
        table: full module name -> its part.
        tp: the one-dimensional tp mesh.
        region: the same group's way in and out.
    """
    functions: dict[Role, Callable[..., Any]] = {
        Role.COLUMN: _column,
        Role.ROW: _row,
        Role.EMBEDDING: _embedding,
        Role.FUSED: _fused,
        Role.SHARED_HEADS: _shared_heads,
        Role.NORM: _norm,
        Role.HEAD: _head,
        Role.REGION: _region,
        Role.REPLICATED: _replicated,
    }
    # torch.compile takes a bound method for the same in all layers, where other callables would
    # make it compile each anew
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
            _patch_head_counts(module, *part.heads)
        if part.role in forwards:
            module.tp_region, module.tp_part = region, part
            module.forward = MethodType(forwards[part.role], module)
    if region.size > 1 and not region.sequence_parallel:
        regions = tuple(f"{name}." for name, part in table.items() if part.role is Role.REGION)
        for name, dropout in model.named_modules():
            if isinstance(dropout, nn.Dropout) and not name.startswith(regions):
                made: Any = dropout
                made.tp_region, made.forward = region, MethodType(_shared_dropout, dropout)


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, self.tp_region, self.tp_part, *args, **kwargs)

    return forward


def _patch_head_counts(module: Any, heads: int, kv_heads: int) -> None:
    """Modules that cut their projections apart by the config's numbers get a config with this
    rank's.
    """
    module.config = copy.copy(module.config)
    module.config.num_attention_heads = heads
    module.num_key_value_heads = kv_heads


def _split(parameter: nn.Parameter, tp: DeviceMesh, dim: int) -> nn.Parameter:
    """A DTensor of the parameter; where the degree doesn't divide (a vocabulary), the last ranks
    hold less.
    """
    assert parameter.is_meta
    whole = parameter.detach()
    empty = whole.narrow(dim, 0, 0)
    chunks = [*whole.chunk(tp.size(), dim=dim), *[empty] * tp.size()]
    local = DTensor.from_local(
        chunks[tp.get_local_rank()].contiguous(),
        tp,
        [Shard(dim)],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return nn.Parameter(local, requires_grad=parameter.requires_grad)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter, with its gradient."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _optional_local(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else local(parameter)


def _column(module: nn.Linear, region: TensorRegion, part: Part, x: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [..., out / tp]"""
    return region.linear(x, local(module.weight), _optional_local(module.bias))


def _row(module: nn.Linear, region: TensorRegion, part: Part, x: torch.Tensor) -> torch.Tensor:
    """[batch, seq, in / tp] -> residual stream; the bias is added once, after the sum"""
    out = region.linear_and_leave(x, local(module.weight))
    return out if module.bias is None else out + module.bias


def _own(x: torch.Tensor, region: TensorRegion, part: Part, dim: int) -> list[torch.Tensor]:
    """This rank's part of each projection that lies in `x` along `dim`: its heads, or the one head
    that it shares.
    """
    own = []
    for piece, (features, heads) in zip(
        x.split([features for features, _ in part.segments], dim=dim), part.segments, strict=True
    ):
        if heads % region.size == 0:
            own.append(piece.chunk(region.size, dim=dim)[region.rank])
        else:
            own.append(
                piece.narrow(
                    dim, region.rank * heads // region.size * (features // heads), features // heads
                )
            )
    return own


def _fused(module: nn.Linear, region: TensorRegion, part: Part, x: torch.Tensor) -> torch.Tensor:
    """[..., in] -> [..., this rank's part of each projection]

    Rows lie over tp as they stand, so that a checkpoint doesn't depend on the degree; the price is
    a gather of the output.
    """
    return torch.cat(
        _own(region.gather_features(_column(module, region, part, x)), region, part, -1), dim=-1
    )


def _shared_heads(
    module: nn.Linear, region: TensorRegion, part: Part, x: torch.Tensor
) -> torch.Tensor:
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
    """int64 [batch, seq] -> residual stream: each rank looks up its own rows, the sum over tp has
    them all
    """
    region.batch = ids.shape[0]
    weight = local(module.weight)
    index = ids - _first_row(module.num_embeddings, region)
    mine = (index >= 0) & (index < weight.shape[0])
    rows = F.embedding(torch.where(mine, index, 0), weight)
    if module.padding_idx is not None:  # that row gets no gradient, as nn.Embedding has it
        rows = torch.where((ids == module.padding_idx)[..., None], rows.detach(), rows)
    out = region.leave(rows.masked_fill(~mine[..., None], 0.0))
    for name in part.scales:
        out = out * getattr(module, name).to(out.dtype)
    return out


def _head(
    module: nn.Linear,
    region: TensorRegion,
    part: Part,
    hidden: torch.Tensor,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """residual stream, int64 [batch, seq] -> summed loss; without labels the whole logits, float32
    [batch, seq, vocab].
    """
    whole, weight = (
        region.enter(hidden if part.scale == 1.0 else hidden * part.scale),
        module.weight,
    )
    if labels is None:
        rows = -(-module.out_features // region.size)
        own = F.linear(whole, local(weight), _optional_local(module.bias))
        padded = F.pad(own, (0, rows - own.shape[-1]))  # the last ranks may hold fewer rows
        return capped(region.gather_features(padded)[..., : module.out_features], part.softcap)
    return linear_cross_entropy(
        whole.flatten(0, 1),
        local(weight),
        labels.flatten(),
        region,
        _first_row(module.out_features, region),
        part.softcap,
        region.compiled,
        _optional_local(module.bias),
    )


def _region(module: nn.Module, region: TensorRegion, part: Part, *args: Any, **kwargs: Any) -> Any:
    x, rest = residual_stream(args, kwargs)
    return type(module).forward(module, region.enter(x), *rest, **kwargs)


def _replicated(
    module: nn.Module, region: TensorRegion, part: Part, *args: Any, **kwargs: Any
) -> torch.Tensor:
    x, rest = residual_stream(args, kwargs)
    return region.share(type(module).forward(module, region.whole(x), *rest, **kwargs))


def residual_stream(
    args: tuple[Any, ...], kwargs: MutableMapping[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Attention and MLP modules take it first, or as `hidden_states`, which is taken out; and the
    other positional arguments.
    """
    x, *rest = args or (kwargs.pop("hidden_states"),)
    return x, tuple(rest)


def _shared_dropout(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Dropout of a residual stream that a TP group holds in common: every rank takes the first
    one's mask.

    Generators differ from rank to rank, since attention's masks are of different heads.
    """
    if not module.training or module.p == 0:
        return x
    region: TensorRegion = module.tp_region
    mask = F.dropout(torch.ones_like(x), module.p)
    return x * region.all_reduce(mask if region.rank == 0 else torch.zeros_like(mask))
