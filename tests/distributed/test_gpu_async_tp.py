"""Matmuls beside the exchange, over symmetric memory, against the same by collectives and in
float64.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gpu_ranks import SIZE, spawn

from tp_trainer.parallel.fast import async_tp_ops, float8
from tp_trainer.parallel.fast.symmetric_memory import SharedBuffer, close_all, possible
from tp_trainer.parallel.mesh import Axis

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(SIZE < 2, reason="needs two GPUs")]
ROWS, INNER, WIDTHS = 96, 128, (160, 64)


def check(rank: int, size: int, group: str, draw: torch.Generator) -> None:
    """Both operators, several in a row, on other numbers each time; then the same as a graph that
    is replayed.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    x, *weights = (
        torch.empty(shape, device=device)
        for shape in ((ROWS, INNER), *((INNER, width) for width in WIDTHS))
    )
    wide = [torch.empty(size * ROWS, width, device=device) for width in WIDTHS]

    def fill() -> None:
        for each in (x, *weights, *wide):
            each.copy_(torch.randn(each.shape, generator=draw))

    def both() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        gathered = async_tp_ops.all_gather_matmul(x, weights, False, [], x.dtype, size, group)
        scattered = async_tp_ops.matmul_reduce_scatter(
            wide, weights, True, [], x.dtype, size, group
        )
        turned = [each.t().contiguous() for each in weights]
        again = async_tp_ops.all_gather_matmul(
            gathered[0][:ROWS] * 2, turned, True, [], x.dtype, size, group
        )
        return gathered, scattered, again

    def all_of(tensor: torch.Tensor) -> torch.Tensor:
        """[size, ...], float64"""
        pieces = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(pieces, tensor)
        return torch.stack(pieces).double()

    def compare(
        gathered: list[torch.Tensor], scattered: list[torch.Tensor], again: list[torch.Tensor]
    ) -> None:
        rows = all_of(x).flatten(0, 1)
        assert torch.equal(gathered[0].double(), rows)
        for matmul, weight in zip(gathered[1:], weights, strict=True):
            torch.testing.assert_close(
                matmul.double(), rows @ weight.double(), rtol=1e-5, atol=1e-4
            )
        parts = sum(
            all_of(each) @ all_of(weight).transpose(1, 2)
            for each, weight in zip(wide, weights, strict=True)
        )
        own = parts.sum(0)[rank * ROWS : (rank + 1) * ROWS]  # type: ignore[union-attr]
        torch.testing.assert_close(
            torch.stack(scattered).double().sum(0), own, rtol=1e-5, atol=1e-4
        )
        first = rows[:ROWS].repeat(size, 1) * 2
        for matmul, weight in zip(again[1:], weights, strict=True):
            torch.testing.assert_close(
                matmul.double(), first @ weight.double(), rtol=1e-5, atol=1e-4
            )

    for _ in range(5):
        fill()
        compare(*both())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(
        graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
    ):
        results = both()
    for _ in range(20):
        fill()
        graph.replay()
        compare(*results)
    graph.reset()


def on_a_rank(device: torch.device) -> None:
    group = dist.distributed_c10d._get_default_group()
    assert possible(Axis(dist.get_world_size(), dist.get_rank(), group), device)
    draw = torch.Generator().manual_seed(dist.get_rank())
    check(dist.get_rank(), SIZE, group.group_name, draw)
    check_float8(dist.get_rank(), SIZE, group.group_name, draw)
    async_tp_ops.close()


def check_float8(rank: int, size: int, group: str, draw: torch.Generator) -> None:
    """Both operators on matrices in float8, against float64 on what these stand for."""
    device = torch.device("cuda", torch.cuda.current_device())

    def low(
        *shape: int, dtype: torch.dtype = float8.FORWARD
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.randn(shape, generator=draw).to(device)
        largest = x.abs().amax()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        values, back = float8.quantised(x, dtype, torch.finfo(dtype).max / largest)
        return values, back, values.double() * back.double()

    for _ in range(5):
        x, scale, exact = low(ROWS, INNER)
        weights, scales, exacts = zip(*(low(width, INNER) for width in WIDTHS), strict=True)
        whole, *matmuls = async_tp_ops.all_gather_matmul(
            x, list(weights), True, [scale, *scales], torch.bfloat16, size, group
        )
        pieces = [torch.empty_like(exact) for _ in range(size)]
        dist.all_gather(pieces, exact)
        assert torch.equal(whole.double() * scale.double(), torch.cat(pieces))
        for matmul, weight in zip(matmuls, exacts, strict=True):
            torch.testing.assert_close(
                matmul.double(), torch.cat(pieces) @ weight.t(), rtol=2e-2, atol=0.2
            )
        gradients, of_gradients, wide = zip(
            *(low(size * ROWS, width, dtype=float8.BACKWARD) for width in WIDTHS), strict=True
        )
        turned = [each.t().contiguous() for each in weights]
        parts = async_tp_ops.matmul_reduce_scatter(
            list(gradients), turned, True, [*of_gradients, *scales], torch.bfloat16, size, group
        )
        total = sum(each @ weight for each, weight in zip(wide, exacts, strict=True))
        dist.all_reduce(total)
        own = total[rank * ROWS : (rank + 1) * ROWS]  # type: ignore[index]
        torch.testing.assert_close(torch.stack(parts).double().sum(0), own, rtol=2e-2, atol=0.5)


def made_while_the_device_is_behind(device: torch.device) -> None:
    """What is queued when memory is made, writes to freed memory that the making takes, touches
    nothing of it.
    """
    rank, group = dist.get_rank(), dist.distributed_c10d._get_default_group().group_name
    for _ in range(10):
        torch.cuda._sleep(100_000_000)
        freed = [torch.full((1,), torch.nan, device=device) for _ in range(8)]
        del freed
        memory = SharedBuffer(1000, torch.empty(0, device=device), group)
        memory.barrier()
        memory.buffer.fill_(rank)
        memory.barrier()
        for other in range(SIZE):
            assert memory.of(other, [1000], 0).eq(other).all()
        memory.barrier()
    close_all()


def test_memory_is_ready_once_it_is_made(tmp_path: Path) -> None:
    spawn(made_while_the_device_is_behind, tmp_path / "store")


def test_exchange_beside_products(tmp_path: Path) -> None:
    spawn(on_a_rank, tmp_path / "store")
