"""Rewrites a compiled block: all-gathers with the products that wait for them, products with the reduce-scatters that wait for those.

A pass over the graph that torch.compile has made of a block's forward or backward pass, whichever family it is of; what it
doesn't recognise stays as it is. What takes its place is in `exchange`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from tp_trainer.parallel import exchange

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)
Weight = tuple[Node, bool]  # a parameter, and whether its transpose is meant


class AsyncTensorParallel(CustomGraphPass):
    """For torch.compile's option `post_grad_custom_pre_pass`."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is _c10d.all_gather_into_tensor.default:
                _gather(graph, node)
            elif node.op == "call_function" and node.target is _c10d.reduce_scatter_tensor.default:
                _scatter(graph, node)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, exchange.__file__))


def _gather(graph: Graph, gather: Node) -> None:
    x, size, group = gather.args
    chain = [gather]
    while (user := _only_user(chain[-1])) is not None and (user.target in _VIEWS or user.target is _c10d.wait_tensor.default):
        chain.append(user)
    whole = chain[-1]
    if whole.meta["val"].ndim != 2:
        return
    found = [(user, *weight) for user in whole.users if (weight := _weight_of_product(user, whole)) is not None]
    if len({transposed for _, _, transposed in found}) != 1 or x.meta["val"].shape[-1] != whole.meta["val"].shape[1]:  # type: ignore[union-attr]
        return
    with graph.inserting_before(whole):
        rows = _new(graph, _aten.reshape.default, (x, [whole.meta["val"].shape[0] // size, -1]))  # type: ignore[operator]
        weights = [weight for _, weight, _ in found]
        results = _call(graph, exchange.gather_multiply, (rows, weights, found[0][2], size, group), 1 + len(found))
    for (user, *_), product in zip(found, results[1:], strict=True):
        if user.target is _aten.addmm.default:
            with graph.inserting_before(user):
                product = _new(graph, _aten.add.Tensor, (product, user.args[0]))
        user.replace_all_uses_with(product)
        graph.erase_node(user)
    whole.replace_all_uses_with(results[0])
    for node in reversed(chain):  # collectives count as having effects
        graph.erase_node(node)


def _scatter(graph: Graph, scatter: Node) -> None:
    total, kind, size, group = scatter.args
    wait = _only_user(scatter)
    terms = _terms(total)
    if wait is None or kind != "sum" or terms is None or len({transposed for _, _, transposed in terms}) != 1:
        return
    xs, weights = [x for x, _, _ in terms], [weight for _, weight, _ in terms]
    with graph.inserting_before(scatter):
        parts = _call(graph, exchange.multiply_scatter, (xs, weights, terms[0][2], size, group), size)  # type: ignore[arg-type]
        own = parts[0]
        for part in parts[1:]:
            own = _new(graph, _aten.add.Tensor, (own, part))
        own = _new(graph, _aten.reshape.default, (own, list(wait.meta["val"].shape)))
    wait.replace_all_uses_with(own)
    graph.erase_node(wait)
    graph.erase_node(scatter)


def _terms(node: Any) -> list[tuple[Node, Node, bool]] | None:
    """(x, weight, transposed) of each product that a sum is made of; None where it is made of something else or used elsewhere too."""
    if len(node.users) != 1:
        return None
    if node.target in _VIEWS:
        return _terms(node.args[0])
    if node.target is _aten.add.Tensor and not node.kwargs and all(isinstance(each, Node) for each in node.args):
        sides = [_terms(each) for each in node.args]
        return None if sides[0] is None or sides[1] is None else sides[0] + sides[1]
    if node.target is _aten.mm.default and (weight := _weight(node.args[1])) is not None:
        return [(node.args[0], *weight)]
    return None


def _weight_of_product(user: Node, x: Node) -> Weight | None:
    """Of x @ weight, or of bias + x @ weight."""
    if user.target is _aten.mm.default and user.args[0] is x:
        return _weight(user.args[1])
    if user.target is _aten.addmm.default and user.args[1] is x and not user.kwargs:
        return _weight(user.args[2])
    return None


def _weight(node: Any) -> Weight | None:
    """What is given to the graph, seen through transpositions."""
    transposed = False
    while node.target in (_aten.permute.default, _aten.t.default):
        if node.target is _aten.permute.default and list(node.args[1]) != [1, 0]:
            return None
        node, transposed = node.args[0], not transposed
    return (node, transposed) if node.op == "placeholder" else None


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _call(graph: Graph, op: Any, args: tuple[Any, ...], count: int) -> list[Node]:
    results = _new(graph, op._opoverload, args)
    return [_new(graph, operator.getitem, (results, index)) for index in range(count)]


def _new(graph: Graph, target: Any, args: tuple[Any, ...]) -> Node:
    """A node with its value, which the passes that follow look at."""
    node = graph.call_function(target, args)
    values = torch.fx.node.map_arg(args, lambda each: each.meta["val"])
    fake = next(each.meta["val"] for each in node.all_input_nodes)
    fake = fake[0] if isinstance(fake, list | tuple) else fake
    with fake.fake_mode:
        node.meta["val"] = target(*values)
    return node
