"""Weights into a sharded model, slice by slice: from safetensors, or drawn as transformers draws
them.

Each rank holds at most its own shard and, when drawing, one whole tensor. What it draws does not
depend on the layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from tp_trainer.models.files import Stored
from tp_trainer.parallel.tensor import local


def own_slices(parameter: torch.Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank holds."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, n) for n in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


@torch.no_grad()
def draw_weights(
    model: PreTrainedModel, reference: PreTrainedModel, seed: int, device: torch.device
) -> None:
    """Random weights by the family's own `_init_weights`, each tensor from its own seed.

    Args:
        model: the sharded, empty model.
        reference: the same architecture on the meta device, not sharded; its modules are filled one
            at a time.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    done: set[int] = set()
    for path, module in reference.named_modules():
        names = [f"{path}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
        # a tied head is drawn once, as the embedding
        names = [name for name in names if id(own[name]) not in done]
        if not names:
            continue
        digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            module.to_empty(device=device, recurse=False)
            reference._init_weights(module)
        for name in names:
            whole = module.get_parameter(name.rpartition(".")[2])
            local(own[name]).copy_(whole[own_slices(own[name])])
            done.add(id(own[name]))
        module.to_empty(device="meta", recurse=False)


@torch.no_grad()
def read_weights(model: PreTrainedModel, places: Mapping[str, Stored]) -> None:
    """Copy each parameter's own slice, and each saved buffer, out of the safetensors files.

    Args:
        places: parameter or buffer -> where it is stored, as `files.matched` has it.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    by_file: dict[Path, list[str]] = {}
    for name, place in places.items():
        by_file.setdefault(place.file, []).append(name)
    for file, names in sorted(by_file.items()):
        with safe_open(file, framework="pt") as tensors:
            for name in names:
                stored = tensors.get_slice(places[name].name)
                slices = own_slices(own[name])
                local(own[name]).copy_(
                    stored[slices] if slices else tensors.get_tensor(places[name].name)
                )
