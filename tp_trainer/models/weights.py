"""Weights into a sharded model, slice by slice: from safetensors, or drawn as transformers draws them.

Each rank holds at most its own shard and, when drawing, one whole tensor. What it draws does not depend on the layout.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from tp_trainer.config import ConfigError
from tp_trainer.parallel.tensor import local


def own_slices(parameter: torch.Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank holds."""
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, n) for n in parameter.shape)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))


@torch.no_grad()
def draw_weights(model: PreTrainedModel, reference: PreTrainedModel, seed: int, device: torch.device) -> None:
    """Random weights by the family's own `_init_weights`, each tensor from its own seed.

    Args:
        model: the sharded, empty model.
        reference: the same architecture on the meta device, not sharded; its modules are filled one at a time.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    done: set[int] = set()
    for path, module in reference.named_modules():
        names = [f"{path}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
        names = [name for name in names if id(own[name]) not in done]  # a tied head is drawn once, as the embedding
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


def find_weights(name: str) -> Path:
    """The directory that holds a model's safetensors: the name itself, or the hub's cache after fetching them.

    Raises:
        ConfigError: no safetensors there, or the hub can't be reached.
    """
    path = Path(name)
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.safetensors.index.json", "config.json"]))
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError("model.name", name, f"the hub gave no weights ({reason}); model.weights=random needs none") from error
    if not any(path.glob("*.safetensors")):
        raise ConfigError("model.name", name, "no *.safetensors there (pickled .bin weights are not read); model.weights=random needs none")
    return path


@torch.no_grad()
def read_weights(model: PreTrainedModel, directory: Path) -> None:
    """Copy each parameter's own slice out of the safetensors files of `directory`.

    Raises:
        ConfigError: tensors that are missing, unexpected or of another shape, by name.
    """
    files = _files_by_tensor(directory)
    own = dict(model.named_parameters())  # a tied head goes by its embedding's name
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(own)
    missing, unexpected = sorted(set(own) - set(files)), sorted(set(files) - set(own) - aliases)
    if missing or unexpected:
        parts = [f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
                 for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise ConfigError("model.name", str(directory), f"its tensors are not the model's; {'; '.join(parts)}")
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as tensors:
            for name, parameter in own.items():
                if files[name] == file:
                    stored = tensors.get_slice(name)
                    if tuple(stored.get_shape()) != tuple(parameter.shape):
                        raise ConfigError("model.name", str(directory),
                                          f"{name} has shape {list(stored.get_shape())}, the model's is {list(parameter.shape)}")
                    local(parameter).copy_(stored[own_slices(parameter)])


def _files_by_tensor(directory: Path) -> dict[str, Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return {name: directory / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    return dict(_names(directory))


def _names(directory: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, file
