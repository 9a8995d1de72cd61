"""FSDP2's exchange without its copies, between ranks of one machine.

FSDP2 gathers a block into one buffer, rank after rank, copies each parameter out of it, and copies gradients, widened, into
another buffer that it reduces. Here parameters are gathered to where they are used, two sets of buffers that the blocks take in
turn; and gradients go from rank to rank as they are, in the dtype of compute, and are added up in float32 by the rank whose
they are: the sum that FSDP2 forms, with half the bytes.

FSDP2 keeps its hooks, streams and order; it calls what is in here through its interface for communication. That a copy is
left out takes three of its internal names (`install`), the same from torch 2.11 to 2.15.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as internal
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU, or a platform without it
    triton = None

BLOCK = 4096


def exchange_directly(model: nn.Module, groups: Sequence[nn.Module], layers: Sequence[nn.Module]) -> None:
    """Have FSDP2 exchange without copies.

    Args:
        model: the root of FSDP2's groups.
        groups: the modules of groups whose gradients are reduced so; others are left to FSDP2.
        layers: those of them whose parameters are gathered so. They run one after the other and are freed after use; two
            neighbours are held at a time.
    """
    install()
    for group in groups:
        if all(each._orig_size[0] % each.mesh_info.shard_mesh_size == 0 for each in _parameters(group)):
            group.set_custom_reduce_scatter(Reduce())  # type: ignore[operator]
    slots = [Slot(), Slot()]
    for number, layer in enumerate(layers):
        layer.set_custom_all_gather(Gather(_parameters(layer), slots[number % 2]))  # type: ignore[operator]

    def begin(*_: Any) -> None:
        for slot in slots:  # FSDP2's streams wait for what came before, and no event may be carried into the capture of a graph
            slot.used = None

    model.register_forward_pre_hook(begin)


def _parameters(module: nn.Module) -> list[Any]:
    return module._get_fsdp_state()._fsdp_param_group.fsdp_params  # type: ignore[operator]


class Slot:
    """Whole parameters of one block at a time."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}
        self.used: torch.cuda.Event | None = None  # its last block has been computed

    def tensor(self, place: int, numel: int, like: torch.Tensor) -> torch.Tensor:
        """[numel], the memory of a block's parameter number `place`."""
        key = place, numel, like.dtype
        if key not in self.tensors:
            self.tensors[key] = like.new_empty(numel)
        return self.tensors[key]

    def release(self) -> None:
        if torch.cuda.is_available():
            self.used = torch.cuda.current_stream().record_event()


class Gather(AllGather):
    """A block's parameters, each gathered into its own memory."""

    def __init__(self, parameters: Sequence[Any], slot: Slot) -> None:
        self.parameters, self.slot = parameters, slot
        self.outputs: list[torch.Tensor] = []

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return _nowhere(size, dtype, device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        inputs: list[torch.Tensor] = output_tensor.inputs  # type: ignore[attr-defined]
        if not self.outputs:
            self._place(inputs, group.size())
        if self.slot.used is not None:
            torch.cuda.current_stream().wait_event(self.slot.used)
        work = group.allgather_into_tensor_coalesced(self.outputs, inputs)
        if async_op:
            return work
        work.wait()
        return None

    def _place(self, inputs: Sequence[torch.Tensor], size: int) -> None:
        assert len(inputs) == len(self.parameters)
        for place, (parameter, shard) in enumerate(zip(self.parameters, inputs, strict=True)):
            whole = self.slot.tensor(place, shard.numel() * size, shard)
            self.outputs.append(whole)
            # with versions of its own: autograd must not take the next block's weights for a change of this one's
            parameter.all_gather_outputs = [whole.data]
            parameter.free_unsharded_param = _nothing
        self.parameters[-1].free_unsharded_param = self.slot.release  # FSDP2 frees them in this order


class Reduce(ReduceScatter):
    """Gradients exchanged in their own dtype, added up in that of the result."""

    def __init__(self) -> None:
        self.given: torch.Tensor | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        if self.given is None:  # what FSDP2 would copy the gradients into; it keeps it until they have been reduced
            self.given = _nowhere(size, dtype, device)
            return self.given
        return torch.empty(tuple(size), dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        assert input_tensor is self.given and op in (dist.ReduceOp.AVG, dist.ReduceOp.SUM), op
        self.given = None
        ranks, rank = group.size(), group.rank()
        pieces: list[torch.Tensor] = [gradient.view(ranks, -1) for gradient in input_tensor.gradients]  # type: ignore[attr-defined]
        received = [piece.new_empty(ranks - 1, piece.shape[1]) for piece in pieces]
        others, exchanged = [other for other in range(ranks) if other != rank], list[dist.P2POp]()
        for piece, places in zip(pieces, received, strict=True):
            for place, other in zip(places, others, strict=True):
                exchanged.append(dist.P2POp(dist.isend, piece[other], group=group, group_peer=other))
                exchanged.append(dist.P2POp(dist.irecv, place, group=group, group_peer=other))
        for work in dist.batch_isend_irecv(exchanged):
            work.wait()
        outputs = output_tensor.split([piece.shape[1] for piece in pieces])
        for output, piece, places in zip(outputs, pieces, received, strict=True):
            add_up(output, piece[rank], places, rank, 1 / ranks if op == dist.ReduceOp.AVG else 1.0)
        return None


def add_up(output: torch.Tensor, own: torch.Tensor, others: torch.Tensor, rank: int, factor: float) -> None:
    """output = factor x (the sum over ranks, in their order).

    Args:
        output: float32 [n].
        own: [n], this rank's.
        others: [ranks - 1, n], the others', in their order.
    """
    if output.is_cuda and own.numel():
        grid = (triton.cdiv(own.numel(), BLOCK),)
        _add_kernel[grid](own, others, output, own.numel(), factor, RANK=rank, RANKS=len(others) + 1, BLOCK=BLOCK, num_warps=8)
        return
    for number, part in enumerate([*others[:rank], own, *others[rank:]]):
        output.copy_(part) if number == 0 else output.add_(part)
    output.mul_(factor)


def _nowhere(size: Sequence[int | torch.SymInt], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[size] without memory. Were it used after all, everything would be nan."""
    return torch.full((1,), torch.nan, dtype=dtype, device=device).expand(*size)


def _is_nowhere(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 1 and tensor.stride(-1) == 0


def _nothing() -> None:
    pass


@cache  # it holds as long as the library lives
def install() -> torch.library.Library:
    """Have FSDP2 leave out its copies into and out of what takes no memory."""
    copied_in = internal.foreach_reduce_scatter_copy_in

    def take(unsharded_grads: list[torch.Tensor], reduce_scatter_input: torch.Tensor, world_size: int) -> None:
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
        output.inputs = inputs  # type: ignore[attr-defined]  # where FSDP2 keeps them until they have been gathered
        return inputs[0], output

    def split_with_sizes_copy(whole: torch.Tensor, sizes: list[int], dim: int = 0, *, out: list[torch.Tensor]) -> None:
        if not _is_nowhere(whole):
            copy_out(whole, sizes, dim, out=out)

    library = torch.library.Library("fsdp", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")  # what is meant
        for key in ("CPU", "CUDA"):
            library.impl("all_gather_copy_in", all_gather_copy_in, key, allow_override=True)
            library.impl("split_with_sizes_copy", split_with_sizes_copy, key, allow_override=True)
    return library


if triton is not None:

    @triton.jit(do_not_specialize=["count"])
    def _add_kernel(own, others, output, count, factor, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        total = tl.zeros((BLOCK,), tl.float32)
        for other in tl.static_range(RANKS):
            if other == RANK:
                part = tl.load(own + at, inside)
            else:
                part = tl.load(others + (other if other < RANK else other - 1) * count.to(tl.int64) + at, inside)
            total += part.to(tl.float32)
        tl.store(output + at, total * factor, inside)

