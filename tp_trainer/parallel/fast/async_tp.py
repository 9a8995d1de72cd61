"""Asynchronous tensor parallelism: a compiler pass that fuses all-gathers with the matmuls that
wait for them, and matmuls with the reduce-scatters that wait for those.

A pass over the graph that torch.compile has made of a block's forward or backward pass, of any
family; what it doesn't recognise stays as it is. What takes its place is in `async_tp_ops`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.fx import Graph, Node

from tp_trainer.parallel.fast import async_tp_ops

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
_VIEWS = (_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default)


@dataclass(frozen=True)
class Matmul:
    """x @ weight, in the graph."""

    node: Node
    x: Node
    weight: Node
    transposed: bool  # whether the weight's transpose is meant
    scales: tuple[Node, ...] = ()  # of x and weight, where they are in float8
    bias: Node | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.node.meta["val"].dtype


class AsyncTensorParallel(CustomGraphPass):
    """For torch.compile's option `post_grad_custom_pre_pass`."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.op == "call_function" and node.target is _c10d.all_gather_into_tensor.default:
                _gather(graph, node)
            elif node.op == "call_function" and node.target is _c10d.reduce_scatter_tensor.default:
                _scatter(graph, node)
        # weights in float8 may be formed after what they are now needed for
        stable_topological_sort(graph)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, async_tp_ops.__file__))


def _gather(graph: Graph, gather: Node) -> None:
    x, size, group = gather.args
    chain = [gather]
    while (user := _only_user(chain[-1])) is not None and user.target in (
        *_VIEWS,
        _aten.view.dtype,
        _c10d.wait_tensor.default,
    ):
        chain.append(user)
    whole = chain[-1]
    if whole.meta["val"].ndim != 2:
        return
    found = [
        matmul
        for user in whole.users
        if (matmul := _matmul(user)) is not None and matmul.x is whole
    ]
    if not _alike(found) or x.meta["val"].shape[-1] != whole.meta["val"].shape[1]:  # type: ignore[union-attr]
        return
    if found[0].scales:  # sent as bytes
        x = x.args[0]  # type: ignore[union-attr]
    with graph.inserting_before(whole):
        rows = _new(graph, _aten.reshape.default, (x, [whole.meta["val"].shape[0] // size, -1]))  # type: ignore[operator]
        scales = [*found[0].scales[:1], *(matmul.scales[1] for matmul in found if matmul.scales)]
        args = (
            rows,
            [matmul.weight for matmul in found],
            found[0].transposed,
            scales,
            found[0].dtype,
            size,
            group,
        )
        results = _call(graph, async_tp_ops.all_gather_matmul, args, 1 + len(found))
    for matmul, result in zip(found, results[1:], strict=True):
        if matmul.bias is not None:
            with graph.inserting_before(matmul.node):
                result = _new(graph, _aten.add.Tensor, (result, matmul.bias))
        matmul.node.replace_all_uses_with(result)
        graph.erase_node(matmul.node)
    whole.replace_all_uses_with(results[0])
    for node in reversed(chain):  # collectives count as having effects
        graph.erase_node(node)


def _scatter(graph: Graph, scatter: Node) -> None:
    total, kind, size, group = scatter.args
    wait, terms = _only_user(scatter), _terms(total)
    if wait is None or kind != "sum" or terms is None or not _alike(terms):
        return
    scales = [
        scale for pair in zip(*(term.scales for term in terms), strict=True) for scale in pair
    ]
    args = (
        [term.x for term in terms],
        [term.weight for term in terms],
        terms[0].transposed,
        scales,
        terms[0].dtype,
        size,
        group,
    )
    with graph.inserting_before(scatter):
        parts = _call(graph, async_tp_ops.matmul_reduce_scatter, args, size)  # type: ignore[arg-type]
        own = parts[0]
        for part in parts[1:]:
            own = _new(graph, _aten.add.Tensor, (own, part))
        own = _new(graph, _aten.reshape.default, (own, list(wait.meta["val"].shape)))
    wait.replace_all_uses_with(own)
    graph.erase_node(wait)
    graph.erase_node(scatter)


def _terms(node: Any) -> list[Matmul] | None:
    """The matmuls that a sum is made of; None where it is made of something else or used elsewhere
    too.
    """
    if len(node.users) != 1:
        return None
    if node.target in _VIEWS:
        return _terms(node.args[0])
    if (
        node.target is _aten.add.Tensor
        and not node.kwargs
        and all(isinstance(each, Node) for each in node.args)
    ):
        sides = [_terms(each) for each in node.args]
        return None if sides[0] is None or sides[1] is None else sides[0] + sides[1]
    matmul = _matmul(node)
    return None if matmul is None or matmul.bias is not None else [matmul]


def _alike(matmuls: list[Matmul]) -> bool:
    """Whether there are any, all of one kind."""
    return len({(matmul.transposed, bool(matmul.scales), matmul.dtype) for matmul in matmuls}) == 1


def _matmul(node: Node) -> Matmul | None:
    """Of a matrix with an input of the graph, a bias added or not; in float8 with any other."""
    x: Any
    weight: Any
    bias: Any = None
    scales: Any = ()
    if node.target is _aten.mm.default:
        x, weight = node.args
    elif node.target is _aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
    elif node.target is _aten._scaled_mm.default:
        names = [argument.name for argument in node.target._schema.arguments]
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if any(given.get(name) for name in ("bias", "scale_result", "use_fast_accum")):
            return None
        x, weight, scales = given["self"], given["mat2"], (given["scale_a"], given["scale_b"])
    else:
        return None
    transposed = False
    while weight.target in (_aten.permute.default, _aten.t.default):
        if weight.target is _aten.permute.default and list(weight.args[1]) != [1, 0]:
            return None
        weight, transposed = weight.args[0], not transposed
    if not scales and weight.op != "placeholder":
        return None
    return Matmul(node, x, weight, transposed, scales, bias)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _call(graph: Graph, op: Any, args: tuple[Any, ...], count: int) -> list[Node]:
    results = _new(graph, op._opoverload, args)
    # scales. The compiler lets an operator that a pass put in have any strides, but float8 is taken
    # in some only
    if args[3]:
        results.meta["eager_input_vals"] = (_values(args), {})
    return [_new(graph, operator.getitem, (results, index)) for index in range(count)]


def _new(graph: Graph, target: Any, args: tuple[Any, ...]) -> Node:
    """A node with its value, which the passes that follow look at."""
    node = graph.call_function(target, args)
    values = _values(args)
    fake = next(each.meta["val"] for each in node.all_input_nodes)
    fake = fake[0] if isinstance(fake, list | tuple) else fake
    with fake.fake_mode:
        node.meta["val"] = target(*values)
    return node


def _values(args: tuple[Any, ...]) -> Any:
    return torch.fx.node.map_arg(args, lambda each: each.meta["val"])
