"""Hides collectives of a compiled block's backward pass behind products that nothing waits for.

The gradient of a weight is needed at the end only. torch.compile leaves it where autograd formed it; here it is put off
until a collective has begun, so that the GPU multiplies while the collective is under way (Megatron-LM overlaps a linear
layer's own two; here any of a block's collectives is served by any weight gradient that is due).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from tp_trainer.parallel.async_tp import AsyncTensorParallel

PRODUCT_FLOPS, COLLECTIVE_BYTES = 700e12, 170e9  # a second, of large bf16 tensors on H200 (benchmarks/RESULTS.md)
SMALL = 1 << 10  # bytes: a few numbers are exchanged before a product beside them would have begun
MARGIN = 2.0  # how much longer than the collective alone the products beside it are to take: ranks wait for each other

_c10d = torch.ops._c10d_functional
_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten._scaled_mm)
_COLLECTIVES = (_c10d.all_gather_into_tensor, _c10d.reduce_scatter_tensor, _c10d.all_reduce)


def compile_options(async_tp: bool) -> dict[str, Any]:
    """torch.compile's options for a block with collectives."""
    if async_tp:
        return {"post_grad_custom_pre_pass": AsyncTensorParallel()}
    return {"reorder_for_compute_comm_overlap": True, "reorder_for_compute_comm_overlap_passes": [put_off]}


def put_off(nodes: Sequence[Any]) -> list[Any]:
    """Inductor's nodes in a new order: products that only an output waits for come between a collective and its wait."""
    waiting = [node for node in nodes if _operation(node) in _PRODUCTS and _only_goes_out(node)]
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
            for product in list(waiting):
                if left > 0 and all(each.name in done or each.name not in produced for each in product.unmet_dependencies):
                    emit(product)
                    waiting.remove(product)
                    left -= _product_seconds(product)
    for product in waiting:
        emit(product)
    return order


def _operation(node: Any) -> Any:
    """torch.ops.aten.mm and the like; None for what Inductor generates."""
    return getattr(getattr(node.node, "op_overload", None), "overloadpacket", None)


def _only_goes_out(node: Any) -> bool:
    return all(user.get_name() == "OUTPUT" for buffer in node.get_outputs() for user in buffer.users)


def _bytes(layout: Any) -> float:
    return math.prod(map(int, layout.get_size())) * layout.get_dtype().itemsize


def _collective_seconds(node: Any) -> float:
    """Of a collective among two ranks, as if it were alone; more ranks move up to twice as much."""
    most = max(map(_bytes, [node.node, *node.node.inputs]))
    return 0.0 if most < SMALL else most / 2 / COLLECTIVE_BYTES


def _product_seconds(node: Any) -> float:
    rows, columns = map(int, node.node.get_size())
    inner = int(node.node.inputs[0].get_size()[1])
    return 2 * rows * columns * inner / PRODUCT_FLOPS
