"""Which matmuls are put off until which collective, on made-up nodes of a backward pass at real
sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tp_trainer.parallel.fast.overlap import defer_matmuls

_c10d, _mm = torch.ops._c10d_functional, torch.ops.aten.mm
# Llama 3 8B at tp 2: 64 MB of residual stream, matmuls of 0.69 ms
TOKENS, HIDDEN, INNER = 8192, 4096, 7168


@dataclass(eq=False)
class Node:
    """As much of Inductor's scheduler node as is looked at."""

    name: str
    operation: Any
    size: tuple[int, int]
    needs: list[Node] = field(default_factory=list)
    goes_out: bool = False
    users: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        def layout(size: tuple[int, int]) -> dict[str, Any]:
            return {"get_size": lambda: size, "get_dtype": lambda: torch.bfloat16}

        # of a weight's gradient, the output's gradient [features, tokens] by the input [tokens,
        # features]
        given = SimpleNamespace(**layout((self.size[0], TOKENS) if self.goes_out else self.size))
        self.node = SimpleNamespace(
            **layout(self.size),
            op_overload=SimpleNamespace(overloadpacket=self.operation),
            inputs=[given],
        )
        for each in self.needs:
            each.users.append(self)

    @property
    def unmet_dependencies(self) -> list[Any]:
        return [SimpleNamespace(name=each.name) for each in self.needs]

    def get_outputs(self) -> list[Any]:
        users = [SimpleNamespace(get_name=lambda each=each: each.name) for each in self.users]
        out = [SimpleNamespace(get_name=lambda: "OUTPUT")] if self.goes_out else []
        return [SimpleNamespace(get_name=lambda: self.name, users=users + out)]


def backward(matmul: Any = _mm) -> list[Node]:
    """A gather, three weight gradients formed on the way, a scatter, a second gather and a last
    weight gradient.
    """
    gather = Node("gather", _c10d.all_gather_into_tensor, (TOKENS, HIDDEN))
    wait = Node("wait", _c10d.wait_tensor, (TOKENS, HIDDEN), [gather])
    first = Node("dw1", matmul, (HIDDEN, INNER), [wait], goes_out=True)
    onward = Node("dx1", matmul, (TOKENS, INNER), [wait])
    second = Node("dw2", matmul, (INNER, HIDDEN), [onward], goes_out=True)
    third = Node("dw3", matmul, (INNER, HIDDEN), [onward], goes_out=True)
    scatter = Node("scatter", _c10d.reduce_scatter_tensor, (TOKENS, HIDDEN), [onward])
    waited = Node("waited", _c10d.wait_tensor, (TOKENS // 2, HIDDEN), [scatter])
    again = Node("again", _c10d.all_gather_into_tensor, (TOKENS, HIDDEN), [waited])
    last = Node("end", _c10d.wait_tensor, (TOKENS, HIDDEN), [again])
    late = Node("dw4", matmul, (HIDDEN, HIDDEN), [last], goes_out=True)
    return [gather, wait, first, onward, second, third, scatter, waited, again, last, late]


@pytest.mark.parametrize("matmul", [_mm, torch.ops.aten._scaled_mm])
def test_each_collective_gets_as_much_as_hides_it(matmul: Any) -> None:
    nodes = backward(matmul)
    order = [node.name for node in defer_matmuls(nodes)]
    # nothing is due at the first gather; 0.69 ms of matmul are enough for 0.2 ms of collective;
    # what is left comes last
    assert order == [
        "gather",
        "wait",
        "dx1",
        "scatter",
        "dw1",
        "waited",
        "again",
        "dw2",
        "end",
        "dw3",
        "dw4",
    ]
    assert sorted(order) == sorted(node.name for node in nodes)


def test_without_collectives_only_what_goes_out_comes_last() -> None:
    order = [
        node.name for node in defer_matmuls([node for node in backward() if node.operation is _mm])
    ]
    assert order == ["dx1", "dw1", "dw2", "dw3", "dw4"]


def test_what_is_needed_further_on_stays() -> None:
    nodes = backward()
    Node("use", _mm, (INNER, INNER), [nodes[4]])  # of dw2
    order = [node.name for node in defer_matmuls(nodes)]
    assert (
        order.index("dw2") < order.index("scatter")
        and order.index("dw3") == order.index("again") + 1
    )
