"""Products beside the exchange that they need, or that needs them: an all-gather or a reduce-scatter in pieces of one rank each.

On GPUs of one host the pieces go through symmetric memory by the copy engines, which take no multiprocessor from the products
(NCCL's kernels do: RESULTS.md), while this rank's own piece is multiplied. Elsewhere the functional collectives do it at once.
The decomposition is that of Wang et al. 2023 (doi:10.1145/3567955.3567959), which PyTorch calls async tensor parallelism.
"""

from __future__ import annotations

import math

import torch

from tp_trainer.parallel.shared import Shared

_ops = torch.ops._c10d_functional


@torch.library.custom_op("tp_trainer::gather_multiply", mutates_args=())
def gather_multiply(x: torch.Tensor, weights: list[torch.Tensor], transposed: bool, size: int, group: str) -> list[torch.Tensor]:
    """The rows of all ranks, and their products with weights.

    Args:
        x: [rows, in], this rank's.
        weights: [in, out] each, or [out, in] where `transposed`.
        size, group: the group's number of ranks and its name.

    Returns:
        [size x rows, in], in the order of the ranks, and for each weight [size x rows, out].
    """
    if not x.is_cuda:
        whole = _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), size, group))
        return [whole, *(whole @ _right(weight, transposed) for weight in weights)]
    x, rows, main = x.contiguous(), x.shape[0], torch.cuda.current_stream()
    whole = x.new_empty(size * rows, x.shape[1])
    factors = [_right(weight, transposed) for weight in weights]
    products = [x.new_empty(size * rows, factor.shape[1]) for factor in factors]
    channel = _channel(group, (size - 1, *x.shape), x)
    rank, arrived = channel.rank, list[torch.cuda.Event]()
    channel.side.wait_stream(main)
    with torch.cuda.stream(channel.side):
        channel.meet()  # all are done with what lies in the buffers
        for step in range(1, size):
            channel.slot((rank + step) % size, step - 1).copy_(x)
            channel.meet()
            arrived.append(channel.side.record_event())
        for step in range(1, size):
            _part(whole, (rank - step) % size, rows).copy_(channel.buffer[step - 1])
        _part(whole, rank, rows).copy_(x)
    for step in range(size):
        if step:
            main.wait_event(arrived[step - 1])
        for product, factor in zip(products, factors, strict=True):
            torch.mm(channel.buffer[step - 1] if step else x, factor, out=_part(product, (rank - step) % size, rows))
    main.wait_stream(channel.side)
    return [whole, *products]


@gather_multiply.register_fake
def _(x: torch.Tensor, weights: list[torch.Tensor], transposed: bool, size: int, group: str) -> list[torch.Tensor]:
    widths = [x.shape[1], *(weight.shape[0 if transposed else 1] for weight in weights)]
    return [x.new_empty(size * x.shape[0], width) for width in widths]


@torch.library.custom_op("tp_trainer::multiply_scatter", mutates_args=())
def multiply_scatter(
    xs: list[torch.Tensor], weights: list[torch.Tensor], transposed: bool, size: int, group: str
) -> list[torch.Tensor]:  # fmt: skip
    """This rank's rows of a sum of products over all ranks, not added up yet: the caller's kernels can do that on the way.

    Args:
        xs: [size x rows, in] each, strided at will.
        weights: [in, out] each, or [out, in] where `transposed`; the sum is of each x with its weight.
        size, group: the group's number of ranks and its name.

    Returns:
        `size` tensors [rows, out], one from each rank.
    """
    factors = [_right(weight, transposed) for weight in weights]
    if not xs[0].is_cuda:
        total = torch.stack([x @ factor for x, factor in zip(xs, factors, strict=True)]).sum(0)
        even = [total.shape[0] // size] * size
        return [part.clone() for part in _ops.wait_tensor(_ops.all_to_all_single(total, even, even, group)).chunk(size)]
    rows, main = xs[0].shape[0] // size, torch.cuda.current_stream()
    parts = [xs[0].new_empty(rows, factors[0].shape[1]) for _ in range(size)]
    channel = _channel(group, (size - 1, *parts[0].shape), parts[0])
    rank = channel.rank
    for step in range(1, size):
        _sum_of_products(xs, factors, (rank + step) % size, rows, out=channel.buffer[step - 1])
        channel.side.wait_stream(main)
        with torch.cuda.stream(channel.side):
            channel.meet()  # each has the part for its neighbour at this distance
            parts[step].copy_(channel.slot((rank - step) % size, step - 1))
    _sum_of_products(xs, factors, rank, rows, out=parts[0])
    with torch.cuda.stream(channel.side):
        channel.meet()  # all are done with what lies in the buffers
    main.wait_stream(channel.side)
    return parts


@multiply_scatter.register_fake
def _(xs: list[torch.Tensor], weights: list[torch.Tensor], transposed: bool, size: int, group: str) -> list[torch.Tensor]:
    width = weights[0].shape[0 if transposed else 1]
    return [xs[0].new_empty(xs[0].shape[0] // size, width) for _ in range(size)]


def _right(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    return weight.t() if transposed else weight


def _part(whole: torch.Tensor, rank: int, rows: int) -> torch.Tensor:
    return whole[rank * rows : (rank + 1) * rows]


def _sum_of_products(xs: list[torch.Tensor], factors: list[torch.Tensor], rank: int, rows: int, out: torch.Tensor) -> None:
    for number, (x, factor) in enumerate(zip(xs, factors, strict=True)):
        part = _part(x, rank, rows)
        if number:
            torch.addmm(out, part, factor, out=out)
        else:
            torch.mm(part, factor, out=out)


class _Channel(Shared):
    """A group's memory for pieces of one shape, and the stream on which its copies follow one another."""

    def __init__(self, group: str, shape: tuple[int, ...], like: torch.Tensor, side: torch.cuda.Stream) -> None:
        super().__init__(math.prod(shape), like, group)
        self.buffer, self.side = self.buffer.view(shape), side

    def slot(self, rank: int, number: int) -> torch.Tensor:
        """Of another rank's buffer."""
        piece = self.buffer[number]
        return self.of(rank, piece.shape, number * piece.numel())


_channels: dict[tuple[str, tuple[int, ...], torch.dtype], _Channel] = {}
_sides: dict[str, torch.cuda.Stream] = {}


def _channel(group: str, shape: tuple[int, ...], like: torch.Tensor) -> _Channel:
    """A collective the first time; a CUDA graph is captured after steps that were not."""
    key = group, shape, like.dtype
    if key not in _channels:
        _channels[key] = _Channel(group, shape, like, _sides.setdefault(group, torch.cuda.Stream()))
    return _channels[key]


def close() -> None:
    """Forget the channels; `shared` gives up their memory."""
    _channels.clear()
    _sides.clear()
