"""Tensors as plain bytes in files, and back: torch.distributed.checkpoint plans who writes and who
reads what, this is its storage.

A file holds chunks of tensors one after another, each row-major and little-endian, nothing between
them; checkpoint/layout.py says where they are.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from tp_trainer.checkpoint.directory import RunDirectory, Sink
from tp_trainer.checkpoint.layout import Chunk, Stored
from tp_trainer.checkpoint.manifest import METADATA, Damaged, Entry
from tp_trainer.checkpoint.store import VerifiedCheckpoint

PIECE_BYTES = 64 << 20  # that go between devices and files at a time
# of a directory, of an object store: there it is waiting that takes the time
READ_THREADS, REMOTE_THREADS = 4, 16
assert sys.byteorder == "little", "files are little-endian, and bytes are taken as they lie"


def write_files(
    files: Mapping[str, list[str]],
    take: Callable[[str], torch.Tensor],
    create: Callable[[str], Sink],
    check: Callable[[str, torch.Tensor], None] = lambda name, tensor: None,
) -> dict[str, Entry]:
    """Write a rank's files. Returns their sizes and checksums.

    Args:
        take: gives a tensor's local part by name; asked once for each, in order.
        check: sees each of them before it is written, and may raise.

    Raises:
        OSError: and whatever an object store's client raises.
    """
    entries, pieces = {}, Pieces()
    for file, names in files.items():
        with create(file) as sink:
            for name in names:
                tensor = take(name)
                check(name, tensor)
                for block in pieces.of(tensor):
                    sink.write(block)
                del tensor
            entries[file] = sink.close()
    return entries


class Pieces:
    """A tensor's bytes in host memory, piece by piece. Of a GPU's, while one is used the next is on
    its way.
    """

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def of(self, tensor: torch.Tensor) -> Iterator[memoryview]:
        """Each piece is good until the next is asked for. GPUs copy on the current stream."""
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if flat.device.type == "cpu":
            for begin in range(0, flat.numel(), PIECE_BYTES):
                yield flat[begin : begin + PIECE_BYTES].numpy().data
            return
        if not self.buffers:
            self.buffers = [
                torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
            ]
        parts = flat.split(PIECE_BYTES)
        events = [torch.cuda.Event(), torch.cuda.Event()]

        def fetch(number: int) -> None:
            self.buffers[number % 2][: parts[number].numel()].copy_(
                parts[number], non_blocking=True
            )
            events[number % 2].record()

        fetch(0)
        for number, part in enumerate(parts):
            if number + 1 < len(parts):
                fetch(number + 1)
            events[number % 2].synchronize()
            yield self.buffers[number % 2][: part.numel()].numpy().data


# --------------------------------------------------------------------------------------------------


def read_tensors(
    found: VerifiedCheckpoint, stored: Mapping[str, Stored], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Fill this rank's part of each tensor (sharded or whole, in its own dtype) from a checkpoint,
    by name. No collective.

    Raises:
        Damaged: a file has gone, or the chunks leave something out.
        OSError: it can't be read.
    """
    wanted = {name: each for name, each in stored.items() if name in tensors}
    items, targets = _planned(wanted, tensors)
    places = {
        (name, chunk.offsets): chunk for name, each in wanted.items() for chunk in each.chunks
    }
    device = next((target.device for target in targets if target.device.type == "cuda"), None)
    store = found.store

    def fill(item: ReadItem, target: torch.Tensor) -> None:
        index = item.storage_index
        assert index.offset is not None
        chunk, dtype = places[index.fqn, tuple(index.offset)], stored[index.fqn].dtype
        _fill(target, chunk, item, dtype, store, found.name)

    def begin() -> None:
        if device is not None:  # a thread's own current device would be the first one
            torch.cuda.set_device(device)

    threads = READ_THREADS if store.local else REMOTE_THREADS
    with ThreadPoolExecutor(threads, initializer=begin) as pool:
        for _ in pool.map(fill, items, targets):
            pass


def _planned(
    stored: Mapping[str, Stored], tensors: Mapping[str, torch.Tensor]
) -> tuple[list[ReadItem], list[torch.Tensor]]:
    """What this rank reads, box by box, and the local tensors that the boxes go into.

    Raises Damaged where a part of a tensor would stay unfilled.
    """
    known = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=each.dtype),
            torch.Size(each.shape),
            [
                ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                for chunk in each.chunks
            ],
        )
        for name, each in stored.items()
    }
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), Metadata(known), is_coordinator=False)  # type: ignore[arg-type]
    items = planner.create_local_plan().items
    targets = [planner.resolve_tensor(item).detach() for item in items]
    filled: dict[str, int] = {}
    for item, target in zip(items, targets, strict=True):
        filled[item.dest_index.fqn] = filled.get(item.dest_index.fqn, 0) + target.numel()
    for name, tensor in tensors.items():
        if filled.get(name, 0) != local(tensor).numel():
            raise Damaged(f"{METADATA} leaves out a part of {name}")
    return items, targets


def _fill(
    target: torch.Tensor,
    chunk: Chunk,
    item: ReadItem,
    dtype: torch.dtype,
    store: RunDirectory,
    name: str,
) -> None:
    """Fill a local tensor from a box of a chunk, as many rows at a time as make a piece."""
    offsets, lengths, size = list(item.storage_offsets), list(item.lengths), dtype.itemsize
    strides = [math.prod(chunk.sizes[dim + 1 :]) for dim in range(len(chunk.sizes))]
    rows = max(1, PIECE_BYTES // (strides[0] * size)) if strides else 1
    for row in range(0, lengths[0] if lengths else 1, rows):
        shape = [min(rows, lengths[0] - row), *lengths[1:]] if lengths else []
        first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True)) + (
            row * strides[0] if strides else 0
        )
        count = 1 + sum(
            (length - 1) * stride for length, stride in zip(shape, strides, strict=True)
        )
        content = _read_range(
            store, f"{name}/{chunk.file}", chunk.start + first * size, count * size
        )
        block = torch.frombuffer(content, dtype=dtype).as_strided(shape, strides)
        (target.narrow(0, row, shape[0]) if shape else target).copy_(block)


def _read_range(store: RunDirectory, name: str, start: int, length: int) -> bytearray:
    """Bytes of a file. Raises Damaged where it ends before."""
    content = bytearray(length)
    if store.local:
        with store.open(name) as file:
            done = 0
            while done < length and (
                more := os.preadv(file.fileno(), [memoryview(content)[done:]], start + done)
            ):
                done += more
    else:
        part = store.fs.cat_file(f"{store.root}/{name}", start=start, end=start + length)
        done = len(part)
        content[:done] = part
    if done != length:
        raise Damaged(f"{name} is shorter than it was")
    return content


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return (
        tensor.to_local().detach()
        if isinstance(tensor, torch.distributed.tensor.DTensor)
        else tensor.detach()
    )
