"""Hides collectives of a compiled block's backward pass behind matmuls that nothing waits for.

The gradient of a weight is needed at the end only. torch.compile leaves it where autograd formed
it; here it is put off until a collective has begun, so that the GPU multiplies while the collective
is under way (Megatron-LM overlaps a linear layer's own two; here any of a block's collectives is
served by any weight gradient that is due).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tp_trainer.parallel.fast.async_tp import AsyncTensorParallel

# a second, of large bf16 tensors on H200 (benchmarks/RESULTS.md)
MATMUL_FLOPS, COLLECTIVE_BYTES = 700e12, 170e9
SMALL = 1 << 10  # bytes: a few numbers are exchanged before a matmul beside them would have begun
# how much longer than the collective alone the matmuls beside it are to take: ranks wait for each
# other
MARGIN = 2.0

_c10d = torch.ops._c10d_functional
_MATMULS = (torch.ops.aten.mm, torch.ops.aten._scaled_mm)
_COLLECTIVES = (_c10d.all_gather_into_tensor, _c10d.reduce_scatter_tensor, _c10d.all_reduce)


def compile_options(async_tp: bool) -> Mapping[str, object]:
    """torch.compile's options for a block with collectives."""
    if async_tp:
        return {"post_grad_custom_pre_pass": AsyncTensorParallel()}
    return {
        "reorder_for_compute_comm_overlap": True,
        "reorder_for_compute_comm_overlap_passes": [defer_matmuls],
    }


def defer_matmuls(nodes: Sequence[Any]) -> list[Any]:
    """Inductor's nodes in a new order: matmuls that only an output waits for come between a
    collective and its wait.
    """
    waiting = [node for node in nodes if _operation(node) in _MATMULS and _only_goes_out(node)]
    deferred, done = set(waiting), set[str]()
    order: list[Any] = []

    def emit(node: Any) -> None:
        order.append(node)
        done.update(buffer.get_name() for buffer in node.get_outputs())

    produced = {buffer.get_name() for node in nodes for buffer in node.get_outputs()}
    for node in nodes:
        if node in deferred:
            continue
        emit(node)
        if _operation(node) in _COLLECTIVES:
            left = MARGIN * _collective_seconds(node)
            for matmul in list(waiting):
                if left > 0 and all(
                    each.name in done or each.name not in produced
                    for each in matmul.unmet_dependencies
                ):
                    emit(matmul)
                    waiting.remove(matmul)
                    left -= _matmul_seconds(matmul)
    for matmul in waiting:
        emit(matmul)
    return order


def _operation(node: Any) -> Any:
    """torch.ops.aten.mm and the like; None for what Inductor generates."""
    return getattr(getattr(node.node, "op_overload", None), "overloadpacket", None)


def _only_goes_out(node: Any) -> bool:
    return all(
        user.get_name() == "OUTPUT" for buffer in node.get_outputs() for user in buffer.users
    )


def _bytes(layout: Any) -> float:
    return math.prod(map(int, layout.get_size())) * layout.get_dtype().itemsize


def _collective_seconds(node: Any) -> float:
    """Of a collective among two ranks, as if it were alone; more ranks move up to twice as much."""
    most = max(map(_bytes, [node.node, *node.node.inputs]))
    return 0.0 if most < SMALL else most / 2 / COLLECTIVE_BYTES


def _matmul_seconds(node: Any) -> float:
    rows, columns = map(int, node.node.get_size())
    inner = int(node.node.inputs[0].get_size()[1])
    return 2 * rows * columns * inner / MATMUL_FLOPS
