"""What runs on a rank: what the recipe makes, without Ray."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from plain_reference import mask_labels
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tp_trainer.config import load
from tp_trainer.data import Cursor
from tp_trainer.loop import train_step
from tp_trainer.models.model import ParallelModel
from tp_trainer.parallel.fast.async_tp import AsyncTensorParallel
from tp_trainer.recipe import Run, build

T = TypeVar("T")
NEEDS_COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))),
    reason="torch.compile needs a C++ compiler",
)


@dataclass(frozen=True)
class Peers:
    """A rank among others that never fail alone and share no node."""

    device: torch.device
    rank: int

    def agree(self, action: Callable[[], T]) -> T:
        return action()

    first = agree


@dataclass
class Trainer(Run):
    cursor: Cursor = field(default_factory=Cursor)

    def step(
        self, masked: bool = False, before_clipping: Callable[[], None] = lambda: None
    ) -> tuple[float, float]:
        """One optimizer step: loss and gradient norm."""
        batches, self.cursor = self.data.step(self.cursor)
        if masked:
            batches = [
                replace(each, labels=mask_labels(each.input_ids, each.labels)) for each in batches
            ]
        clip = self.config.train.clip_grad_norm
        loss, norm = train_step(
            self.model, self.optimizer, batches, self.mesh, clip, before_clipping=before_clipping
        )
        return loss.item(), norm.item()


def trainer(
    settings: dict[str, Any],
    device: torch.device | None = None,
    trainable: Callable[[str], bool] = lambda name: True,
    lean: bool = False,
) -> Trainer:
    peers = Peers(device or torch.device("cpu"), dist.get_rank())
    made = build(load(settings), peers, tokenizer="none", trainable=trainable, lean=lean)
    return Trainer(made.config, made.mesh, made.model, made.data, made.optimizer)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; a collective."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole_parameters(model: ParallelModel) -> dict[str, torch.Tensor] | None:
    """Every parameter in full, on rank 0."""
    full = {name: whole(parameter) for name, parameter in model.module.named_parameters()}
    return full if dist.get_rank() == 0 else None


def run_steps(
    settings: dict[str, Any],
    steps: int,
    masked: bool = False,
    trainable: Callable[[str], bool] = lambda name: True,
) -> dict[str, Any]:
    """Losses, gradient norms and final parameters of some steps, and the gradients of the first."""
    made = trainer(settings, trainable=trainable)
    gradients: dict[str, torch.Tensor] = {}

    def keep() -> None:
        gradients.update(
            {
                name: whole(p.grad)
                for name, p in made.model.module.named_parameters()
                if p.grad is not None
            }
        )

    losses, norms = zip(
        *(made.step(masked, (lambda: None) if step else keep) for step in range(steps)), strict=True
    )
    parameters = whole_parameters(made.model)
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients if parameters is not None else None,
        "parameters": parameters,
    }


class Watch(TorchDispatchMode):
    """Shows each operation on plain tensors, backward passes and those inside DTensors included, to
    `seen(name, outputs)`.
    """

    def __init__(self, seen: Callable[[str, list[torch.Tensor]], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it comes again with local tensors
        out = func(*args, **(kwargs or {}))
        self.seen(str(func), [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)])
        return out


def count_operations() -> tuple[Counter[str], Watch]:
    counts: Counter[str] = Counter()
    return counts, Watch(lambda name, _: counts.update([name]))


@contextmanager
def passes_run() -> Iterator[None]:
    """Graphs are compiled by all passes meanwhile, none taken from an earlier compilation; what the
    C++ compiler made of a kernel is.
    """
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@contextmanager
def exchanges_of_graphs() -> Iterator[list[Counter[str]]]:
    """The exchanges, by kind, in each graph that is compiled meanwhile, forward and backward, once
    matmuls have been joined to them.
    """
    found = list[Counter[str]]()
    rewrite = AsyncTensorParallel.__call__

    def seen(self: AsyncTensorParallel, graph: torch.fx.Graph) -> None:
        rewrite(self, graph)
        graph.lint()
        names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        found.append(
            Counter(
                name.split(".")[-2]
                for name in names
                if name.startswith(("tp_trainer", "_c10d")) and "wait" not in name
            )
        )

    torch._dynamo.reset()
    with (
        pytest.MonkeyPatch.context() as patch,
        passes_run(),
    ):
        patch.setattr(AsyncTensorParallel, "__call__", seen)
        yield found
    torch._dynamo.reset()
