"""Operators of asynchronous tensor parallelism: an all-gather with the matmuls that wait for it,
and matmuls with the reduce-scatter that waits for them, in pieces of one rank each.

On GPUs of one host the pieces go through symmetric memory by the copy engines, which take no
multiprocessor from the matmuls (NCCL's kernels do: RESULTS.md), while this rank's own piece is
multiplied. Elsewhere the functional collectives do it at once. The decomposition is that of Wang et
al. 2023 (doi:10.1145/3567955.3567959), which PyTorch calls async tensor parallelism.
"""

from __future__ import annotations

import math

import torch

from tp_trainer.parallel.collectives import all_gather
from tp_trainer.parallel.fast import float8
from tp_trainer.parallel.fast.symmetric_memory import SharedBuffer

_ops = torch.ops._c10d_functional


@torch.library.custom_op("tp_trainer::all_gather_matmul", mutates_args=())
def all_gather_matmul(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    transposed: bool,
    scales: list[torch.Tensor],
    dtype: torch.dtype,
    size: int,
    group: str,
) -> list[torch.Tensor]:
    """The rows of all ranks, and their matmuls with weights.

    Args:
        x: [rows, in], this rank's.
        weights: [in, out] each, or [out, in] where `transposed`.
        scales: where they are in float8, float32 scalars: of x, the same on all ranks, and of each
            weight; else none.
        dtype: of the matmuls.
        size, group: the group's number of ranks and its name.

    Returns:
        [size x rows, in], in the order of the ranks, and for each weight [size x rows, out].
    """
    if not x.is_cuda:
        whole = (
            all_gather(x.view(torch.uint8), group, size).view(x.dtype)
            if scales
            else all_gather(x, group, size)
        )
        return [
            whole,
            *_matmuls(
                [whole] * len(weights),
                weights,
                transposed,
                scales[:1] * len(weights) + scales[1:],
                dtype,
            ),
        ]
    x, rows, main = x.contiguous(), x.shape[0], torch.cuda.current_stream()
    whole = x.new_empty(size * rows, x.shape[1])
    factors = [_right(weight, transposed) for weight in weights]
    matmuls = [x.new_empty(size * rows, factor.shape[1], dtype=dtype) for factor in factors]
    channel = _channel(group, (size - 1, *x.shape), x)
    rank, arrived = channel.rank, _send_to_all(x, whole, channel)
    for step in range(size):
        if step:
            main.wait_event(arrived[step - 1])
        piece = channel.buffer[step - 1] if step else x
        for number, (matmul, factor) in enumerate(zip(matmuls, factors, strict=True)):
            _multiply(
                piece,
                factor,
                scales and [scales[0], scales[1 + number]],
                _part(matmul, (rank - step) % size, rows),
            )
    main.wait_stream(channel.side)
    return [whole, *matmuls]


def _send_to_all(x: torch.Tensor, whole: torch.Tensor, channel: _Channel) -> list[torch.cuda.Event]:
    """On the channel's stream: put this rank's rows into everyone's buffer, and all ranks' into
    `whole`. Returns events, when the piece of each step has come.
    """
    rank, rows, arrived = channel.rank, x.shape[0], list[torch.cuda.Event]()
    size = whole.shape[0] // rows
    channel.side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(channel.side):
        channel.barrier()  # all are done with what lies in the buffers
        for step in range(1, size):
            channel.slot((rank + step) % size, step - 1).copy_(x)
            channel.barrier()
            arrived.append(channel.side.record_event())
        for step in range(1, size):
            _part(whole, (rank - step) % size, rows).copy_(channel.buffer[step - 1])
        _part(whole, rank, rows).copy_(x)
    return arrived


@all_gather_matmul.register_fake
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    transposed: bool,
    scales: list[torch.Tensor],
    dtype: torch.dtype,
    size: int,
    group: str,
) -> list[torch.Tensor]:
    rows, widths = size * x.shape[0], [weight.shape[0 if transposed else 1] for weight in weights]
    return [
        x.new_empty(rows, x.shape[1]),
        *(x.new_empty(rows, width, dtype=dtype) for width in widths),
    ]


@torch.library.custom_op("tp_trainer::matmul_reduce_scatter", mutates_args=())
def matmul_reduce_scatter(
    xs: list[torch.Tensor],
    weights: list[torch.Tensor],
    transposed: bool,
    scales: list[torch.Tensor],
    dtype: torch.dtype,
    size: int,
    group: str,
) -> list[torch.Tensor]:
    """This rank's rows of a sum of matmuls over all ranks, not added up yet: the caller's kernels
    can do that on the way.

    Args:
        xs: [size x rows, in] each, strided at will; best in rows where they are in float8.
        weights: as above; the sum is of each x with its weight.
        scales: where they are in float8, float32 scalars: of each x, then of each weight; else
            none.
        dtype: of the matmuls.
        size, group: the group's number of ranks and its name.

    Returns:
        `size` tensors [rows, out], one from each rank.
    """
    if not xs[0].is_cuda:
        total = torch.stack(_matmuls(xs, weights, transposed, scales, dtype)).sum(0)
        even = [total.shape[0] // size] * size
        return [
            part.clone()
            for part in _ops.wait_tensor(_ops.all_to_all_single(total, even, even, group)).chunk(
                size
            )
        ]
    factors = [_right(weight, transposed) for weight in weights]
    xs = [x.contiguous() for x in xs] if scales else xs
    rows, main = xs[0].shape[0] // size, torch.cuda.current_stream()
    parts = [xs[0].new_empty(rows, factors[0].shape[1], dtype=dtype) for _ in range(size)]
    channel = _channel(group, (size - 1, *parts[0].shape), parts[0])
    rank = channel.rank

    def form(other: int, out: torch.Tensor) -> None:
        for number, (x, factor) in enumerate(zip(xs, factors, strict=True)):
            _multiply(_part(x, other, rows), factor, scales[number :: len(xs)], out, add=number > 0)

    for step in range(1, size):
        form((rank + step) % size, channel.buffer[step - 1])
        channel.side.wait_stream(main)
        with torch.cuda.stream(channel.side):
            channel.barrier()  # each has the part for its neighbour at this distance
            parts[step].copy_(channel.slot((rank - step) % size, step - 1))
    form(rank, parts[0])
    with torch.cuda.stream(channel.side):
        channel.barrier()  # all are done with what lies in the buffers
    main.wait_stream(channel.side)
    return parts


@matmul_reduce_scatter.register_fake
def _(
    xs: list[torch.Tensor],
    weights: list[torch.Tensor],
    transposed: bool,
    scales: list[torch.Tensor],
    dtype: torch.dtype,
    size: int,
    group: str,
) -> list[torch.Tensor]:
    width = weights[0].shape[0 if transposed else 1]
    return [xs[0].new_empty(xs[0].shape[0] // size, width, dtype=dtype) for _ in range(size)]


def _right(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    factor = weight.t() if transposed else weight
    # the hardware takes float8 in columns only
    return factor.t().contiguous().t() if factor.itemsize == 1 else factor


def _part(whole: torch.Tensor, rank: int, rows: int) -> torch.Tensor:
    return whole[rank * rows : (rank + 1) * rows]


def _matmuls(
    xs: list[torch.Tensor],
    weights: list[torch.Tensor],
    transposed: bool,
    scales: list[torch.Tensor],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """Of each x with its weight, on CPU. `scales`: none, or of each x, then of each weight."""
    factors = [_right(weight, transposed) for weight in weights]
    if not scales:
        return [x @ factor for x, factor in zip(xs, factors, strict=True)]
    pairs = zip(scales[: len(xs)], scales[len(xs) :], strict=True)
    return [
        float8.matmul(x, a, factor.t(), b, dtype)
        for x, factor, (a, b) in zip(xs, factors, pairs, strict=True)
    ]


def _multiply(
    x: torch.Tensor,
    factor: torch.Tensor,
    scales: list[torch.Tensor],
    out: torch.Tensor,
    add: bool = False,
) -> None:
    """out = x @ factor, or that added to it; of float8 with the scales of both."""
    if not scales:
        if add:
            torch.addmm(out, x, factor, out=out)
        else:
            torch.mm(x, factor, out=out)
    elif add:
        out.add_(
            torch._scaled_mm(x, factor, scale_a=scales[0], scale_b=scales[1], out_dtype=out.dtype)
        )
    else:
        torch._scaled_mm(
            x, factor, scale_a=scales[0], scale_b=scales[1], out_dtype=out.dtype, out=out
        )


class _Channel(SharedBuffer):
    """A group's memory for pieces of one shape, and the stream on which its copies follow one
    another.
    """

    def __init__(
        self, group: str, shape: tuple[int, ...], like: torch.Tensor, side: torch.cuda.Stream
    ) -> None:
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
    """Forget the channels; `symmetric_memory` gives up their memory."""
    _channels.clear()
    _sides.clear()
