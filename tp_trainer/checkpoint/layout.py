"""Which tensor lies where in the files of a checkpoint: planned by torch.distributed.checkpoint,
kept in metadata.json.

That is `{"tensors": {name: {"dtype", "shape", "chunks": [{"offsets", "sizes", "file", "start",
"bytes"}]}}}`, with offsets and sizes in elements of the whole tensor, start and bytes
in the file. Every part of it is checked before it is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.planner import SavePlan

from tp_trainer.checkpoint.manifest import FILE, METADATA, Damaged, Entry, render
from tp_trainer.checkpoint.store import VerifiedCheckpoint

SUFFIX = ".distcp"
FILE_BYTES = 1 << 30  # after which a rank begins another file
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    bytes: int


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk]


def layout(plans: Sequence[SavePlan]) -> tuple[list[dict[str, list[str]]], dict[str, Stored]]:
    """Where everything goes: for each rank its files with the names of the tensors in them, in
    order; and every tensor's chunks.
    """
    tensors: dict[str, Stored] = {}
    ranks: list[dict[str, list[str]]] = []
    for rank, plan in enumerate(plans):
        files: dict[str, list[str]] = {}
        file, size = "", FILE_BYTES
        for item in plan.items:
            data = item.tensor_data
            assert data is not None, f"{item.index.fqn} is no tensor"
            count = math.prod(data.chunk.sizes)
            if not count:
                continue  # a rank that has nothing of a tensor
            dtype, shape = data.properties.dtype, tuple(data.size)
            stored = tensors.setdefault(item.index.fqn, Stored(dtype, shape, []))
            if size >= FILE_BYTES:
                file, size = f"{rank:05d}_{len(files):04d}{SUFFIX}", 0
                files[file] = []
            files[file].append(item.index.fqn)
            length = count * dtype.itemsize
            offsets, sizes = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
            stored.chunks.append(Chunk(offsets, sizes, file, size, length))
            size += length
        ranks.append(files)
    return ranks, tensors


def render_metadata(tensors: Mapping[str, Stored]) -> bytes:
    """The content of metadata.json."""
    return render({"tensors": {name: _plain(each) for name, each in tensors.items()}})


def _plain(stored: Stored) -> dict[str, object]:
    dtype = str(stored.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": stored.shape, "chunks": [vars(each) for each in stored.chunks]}


def read_metadata(found: VerifiedCheckpoint) -> dict[str, Stored]:
    """The tensors of a checkpoint. Raises Damaged where metadata.json doesn't describe them."""
    try:
        content = json.loads(found.store.read(f"{found.name}/{METADATA}"))
        return {name: _stored(each, found.files) for name, each in content["tensors"].items()}
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise Damaged(
            f"{METADATA} doesn't describe the files ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _stored(value: Mapping[str, Any], files: Mapping[str, Entry]) -> Stored:
    """One tensor of metadata.json. Raises ValueError, TypeError or KeyError for what can't be."""
    dtype, shape = DTYPES[value["dtype"]], _counts(value["shape"])
    chunks = []
    for each in value["chunks"]:
        chunk = Chunk(
            _counts(each["offsets"]),
            _counts(each["sizes"]),
            each["file"],
            *_counts([each["start"], each["bytes"]]),
        )
        inside = len(chunk.offsets) == len(chunk.sizes) == len(shape) and all(
            offset + size <= whole
            for offset, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
        )
        if not inside or chunk.bytes != math.prod(chunk.sizes) * dtype.itemsize:
            raise ValueError("a chunk doesn't lie in its tensor")
        if not FILE.fullmatch(chunk.file) or chunk.start + chunk.bytes > files[chunk.file].bytes:
            raise ValueError("a chunk doesn't lie in its file")
        chunks.append(chunk)
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise ValueError("chunks don't make up their tensor")
    return Stored(dtype, shape, chunks)


def _counts(values: Sequence[Any]) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(
        type(each) is int and 0 <= each < 1 << 60 for each in values
    ):
        raise ValueError("not a list of whole numbers")
    return tuple(values)
