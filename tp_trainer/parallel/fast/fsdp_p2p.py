"""FSDP2's all-gather and reduce-scatter by peer access, without their copies: GPUs write into one
another's memory by their copy engines.

FSDP2 gathers a block into one buffer, rank after rank, copies each parameter out of it, and copies
gradients, widened, into another buffer that it reduces. Here parameters are gathered to where they
are used, two sets of buffers that the blocks take in turn; and gradients go from rank to rank as
they are, in the dtype of compute, and are added up in float32 by the rank whose they are: the sum
that FSDP2 forms, with half the bytes.

FSDP2 keeps its hooks, streams and order; it calls what is in here through its interface for
communication. That a copy is left out takes three of its internal names (`install`), the same from
torch 2.11 to 2.15.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as internal
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from tp_trainer.parallel.fast.symmetric_memory import SharedBuffer

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU, or a platform without it
    triton = None

BLOCK = 4096
ALIGNMENT = 256  # bytes


def use_peer_access(
    model: nn.Module, groups: Sequence[nn.Module], layers: Sequence[nn.Module]
) -> None:
    """Have FSDP2 gather and reduce by peer access, in place.

    Args:
        model: the root of FSDP2's groups.
        groups: the modules of groups whose gradients are reduced so; others are left to FSDP2.
        layers: those of them whose parameters are gathered so. They run one after the other and are
            freed after use; two neighbours are held at a time.
    """
    install()
    channel = Channel()
    for group in groups:
        if all(
            each._orig_size[0] % each.mesh_info.shard_mesh_size == 0 for each in _parameters(group)
        ):
            group.set_custom_reduce_scatter(Reduce(channel))  # type: ignore[operator]
    slots = [Slot(), Slot()]
    for number, layer in enumerate(layers):
        layer.set_custom_all_gather(Gather(_parameters(layer), slots[number % 2], channel))  # type: ignore[operator]

    def begin(*_: Any) -> None:
        # FSDP2's streams wait for what came before, and no event may be carried into the capture of
        # a graph
        for slot in slots:
            slot.used = None

    model.register_forward_pre_hook(begin)


def _parameters(module: nn.Module) -> list[Any]:
    return module._get_fsdp_state()._fsdp_param_group.fsdp_params  # type: ignore[operator]


class Channel:
    """What ranks put into one another's memory, by the copy engines on GPUs.

    All of it follows one another on one stream: the ranks wait for one another in it, and must do
    so in the same order, also where branches of a CUDA graph are free to run in any.
    """

    def __init__(self) -> None:
        self.side: torch.cuda.Stream | None = None
        self.received: dict[tuple[int, torch.dtype], SharedBuffer] = {}

    def gather(
        self, shards: Sequence[torch.Tensor], memory: SharedBuffer, places: Sequence[int]
    ) -> None:
        """Put shards [n] to their place in everyone's [ranks, n]; those begin at `places`."""
        with self._beside():
            memory.barrier()  # all are done with what lies there
            for other in _from(memory.rank, memory.size):
                for shard, place in zip(shards, places, strict=True):
                    memory.of(other, shard.shape, place + memory.rank * shard.numel()).copy_(shard)
            memory.barrier()

    def swap(self, pieces: Sequence[torch.Tensor], group: str) -> list[torch.Tensor]:
        """For pieces [ranks, n] what the others had in this rank's row: [ranks - 1, n], in their
        order, valid until the next call.
        """
        size, widths, dtype = len(pieces[0]), [piece.shape[1] for piece in pieces], pieces[0].dtype
        places, total = _places(widths, dtype)
        if (total, dtype) not in self.received:
            self.received[total, dtype] = SharedBuffer((size - 1) * total, pieces[0], group)
        memory = self.received[total, dtype]
        with self._beside():
            memory.barrier()
            for other in _from(memory.rank, size)[:-1]:
                row = memory.rank - (memory.rank > other)
                for piece, place in zip(pieces, places, strict=True):
                    memory.of(other, piece[other].shape, row * total + place).copy_(piece[other])
            memory.barrier()
        rows = memory.buffer.view(size - 1, total)
        return [rows[:, place : place + width] for place, width in zip(places, widths, strict=True)]

    @contextmanager
    def _beside(self) -> Iterator[None]:
        if not torch.cuda.is_available():
            yield
            return
        self.side, main = self.side or torch.cuda.Stream(), torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            yield
        main.wait_stream(self.side)


def _from(rank: int, size: int) -> list[int]:
    """All ranks, each one's beginning with another, itself the last."""
    return [(rank + step) % size for step in range(1, size + 1)]


def _places(sizes: Sequence[int], dtype: torch.dtype) -> tuple[list[int], int]:
    """Where tensors of so many elements begin one after the other, aligned; and where the last
    ends.
    """
    places, end = list[int](), 0
    for size in sizes:
        places.append(end)
        end += -(-size * dtype.itemsize // ALIGNMENT) * ALIGNMENT // dtype.itemsize
    return places, end


class Slot:
    """Whole parameters of one block at a time."""

    def __init__(self) -> None:
        self.memory: dict[tuple[int, ...], tuple[SharedBuffer, list[int], list[torch.Tensor]]] = {}
        self.used: torch.cuda.Event | None = None  # its last block has been computed

    def place(
        self, shards: Sequence[torch.Tensor], group: dist.ProcessGroup
    ) -> tuple[SharedBuffer, list[int], list[torch.Tensor]]:
        """Memory for the whole of shards [n]; where each begins in it, and its [ranks x n]."""
        sizes = tuple(shard.numel() * group.size() for shard in shards)
        if sizes not in self.memory:
            places, total = _places(sizes, shards[0].dtype)
            memory = SharedBuffer(total, shards[0], group.group_name)
            self.memory[sizes] = (
                memory,
                places,
                [
                    memory.of(memory.rank, [size], place)
                    for size, place in zip(sizes, places, strict=True)
                ],
            )
        return self.memory[sizes]

    def release(self) -> None:
        if torch.cuda.is_available():
            self.used = torch.cuda.current_stream().record_event()


class Gather(AllGather):
    """A block's parameters, each gathered into its own memory."""

    def __init__(self, parameters: Sequence[Any], slot: Slot, channel: Channel) -> None:
        self.parameters, self.slot, self.channel = parameters, slot, channel

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return _nowhere(size, dtype, device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        shards: list[torch.Tensor] = output_tensor.inputs  # type: ignore[attr-defined]
        memory, places, wholes = self.slot.place(shards, group)
        if self.slot.used is not None:
            torch.cuda.current_stream().wait_event(self.slot.used)
        self.channel.gather(shards, memory, places)
        if self.parameters[-1].all_gather_outputs:
            return
        for parameter, whole in zip(self.parameters, wholes, strict=True):
            # with versions of its own: autograd must not take the next block's weights for a change
            # of this one's
            parameter.all_gather_outputs = [whole.data]
            parameter.free_unsharded_param = _nothing
        # FSDP2 frees them in this order
        self.parameters[-1].free_unsharded_param = self.slot.release


class Reduce(ReduceScatter):
    """A reduce-scatter that sends gradients in their own dtype, added up in the result's."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.given: torch.Tensor | None = None

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        # what FSDP2 would copy the gradients into; it keeps it until they have been reduced
        if self.given is None:
            self.given = _nowhere(size, dtype, device)
            return self.given
        return torch.empty(tuple(size), dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        assert input_tensor is self.given and op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM), op
        self.given = None
        ranks, rank = group.size(), group.rank()
        gradients: list[torch.Tensor] = input_tensor.gradients  # type: ignore[attr-defined]
        pieces = [gradient.view(ranks, -1) for gradient in gradients]
        received = self.channel.swap(pieces, group.group_name)
        outputs = output_tensor.split([piece.shape[1] for piece in pieces])
        for output, piece, others in zip(outputs, pieces, received, strict=True):
            add_up(output, piece[rank], others, rank, 1 / ranks if op == dist.ReduceOp.AVG else 1.0)


def add_up(
    output: torch.Tensor, own: torch.Tensor, others: torch.Tensor, rank: int, factor: float
) -> None:
    """output = factor x (the sum over ranks, in their order).

    Args:
        output: float32 [n].
        own: [n], this rank's.
        others: [ranks - 1, n], the others', in their order.
    """
    if output.is_cuda and own.numel():
        grid = (triton.cdiv(own.numel(), BLOCK),)
        sizes, constants = (
            (own.numel(), others.stride(0), factor),
            {"RANK": rank, "RANKS": len(others) + 1, "BLOCK": BLOCK},
        )
        _add_kernel[grid](own, others, output, *sizes, **constants, num_warps=8)
        return
    for number, part in enumerate([*others[:rank], own, *others[rank:]]):
        output.copy_(part) if number == 0 else output.add_(part)
    output.mul_(factor)


def _nowhere(
    size: Sequence[int | torch.SymInt], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[size] without memory. Were it used after all, everything would be NaN."""
    return torch.full((1,), torch.nan, dtype=dtype, device=device).expand(*size)


def _is_nowhere(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 1 and tensor.stride(-1) == 0


def _nothing() -> None:
    pass


@cache  # it holds as long as the library lives
def install() -> torch.library.Library:
    """Have FSDP2 leave out its copies into and out of what takes no memory."""
    copied_in = internal.foreach_reduce_scatter_copy_in

    def take(
        unsharded_grads: list[torch.Tensor], reduce_scatter_input: torch.Tensor, world_size: int
    ) -> None:
        if _is_nowhere(reduce_scatter_input):
            reduce_scatter_input.gradients = [gradient.contiguous() for gradient in unsharded_grads]  # type: ignore[attr-defined]
        else:
            copied_in(unsharded_grads, reduce_scatter_input, world_size)

    internal.foreach_reduce_scatter_copy_in = take
    copy_in, copy_out = internal.all_gather_copy_in_cuda, internal.split_with_sizes_copy

    def all_gather_copy_in(
        inputs: list[torch.Tensor], output: torch.Tensor, sizes: list[int], numel: int, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not _is_nowhere(output):
            return copy_in(inputs, output, sizes, numel, rank)
        # where FSDP2 keeps them until they have been gathered
        output.inputs = inputs  # type: ignore[attr-defined]
        return inputs[0], output

    def split_with_sizes_copy(
        whole: torch.Tensor, sizes: list[int], dim: int = 0, *, out: list[torch.Tensor]
    ) -> None:
        if not _is_nowhere(whole):
            copy_out(whole, sizes, dim, out=out)

    library = torch.library.Library("fsdp", "IMPL")
    with warnings.catch_warnings():
        # what is meant
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for key in ("CPU", "CUDA"):
            library.impl("all_gather_copy_in", all_gather_copy_in, key, allow_override=True)
            library.impl("split_with_sizes_copy", split_with_sizes_copy, key, allow_override=True)
    return library


if triton is not None:

    @triton.jit(do_not_specialize=["count", "row"])
    def _add_kernel(  # type: ignore[no-untyped-def]
        own,
        others,
        output,
        count,
        row,
        factor,
        RANK: tl.constexpr,
        RANKS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        total = tl.zeros((BLOCK,), tl.float32)
        for other in tl.static_range(RANKS):
            if other == RANK:
                part = tl.load(own + at, inside)
            else:
                part = tl.load(
                    others + (other if other < RANK else other - 1) * row.to(tl.int64) + at, inside
                )
            total += part.to(tl.float32)
        tl.store(output + at, total * factor, inside)
