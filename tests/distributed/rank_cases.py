"""What runs on a rank: the trainer's own parts put together as worker.py does, without Ray."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_reference import data_of, mask_labels
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tp_trainer.config import Config, load
from tp_trainer.data import Cursor, DataStream
from tp_trainer.loop import train_step
from tp_trainer.models.build import ParallelModel, build_model
from tp_trainer.optim import AdamW, build_optimizer
from tp_trainer.parallel.async_tp import AsyncTensorParallel
from tp_trainer.parallel.mesh import Mesh, build_mesh

NEEDS_COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="torch.compile needs a C++ compiler")


@dataclass
class Trainer:
    config: Config
    mesh: Mesh
    model: ParallelModel
    optimizer: AdamW
    data: DataStream
    cursor: Cursor

    def step(self, masked: bool = False, before_clipping: Callable[[], None] = lambda: None) -> tuple[float, float]:
        """One optimizer step: loss and gradient norm."""
        batches, self.cursor = self.data.step(self.cursor)
        if masked:
            batches = [{**batch, "labels": mask_labels(batch["input_ids"], batch["labels"])} for batch in batches]
        clip = self.config.train.clip_grad_norm
        loss, norm = train_step(self.model, self.optimizer, batches, self.mesh, clip, before_clipping=before_clipping)
        return loss.item(), norm.item()


def trainer(settings: dict[str, Any], device: torch.device | None = None) -> Trainer:
    config = load(settings)
    mesh = build_mesh(config.parallelism, device or torch.device("cpu"))
    model = build_model(config, mesh, lambda find: find())
    optimizer = build_optimizer(config.optim, model.module.named_parameters())
    data = data_of(settings, mesh.dp_rank, mesh.dp_size)
    torch.manual_seed(config.seed + 1 + dist.get_rank())
    return Trainer(config, mesh, model, optimizer, data, Cursor())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; a collective."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole_parameters(model: ParallelModel) -> dict[str, torch.Tensor] | None:
    """Every parameter in full, on rank 0."""
    full = {name: whole(parameter) for name, parameter in model.module.named_parameters()}
    return full if dist.get_rank() == 0 else None


def run_steps(settings: dict[str, Any], steps: int, masked: bool = False) -> dict[str, Any]:
    """Losses, gradient norms and final parameters of some steps, and the gradients of the first."""
    made = trainer(settings)
    gradients: dict[str, torch.Tensor] = {}

    def keep() -> None:
        gradients.update({name: whole(p.grad) for name, p in made.model.module.named_parameters() if p.grad is not None})

    losses, norms = zip(*(made.step(masked, (lambda: None) if step else keep) for step in range(steps)), strict=True)
    parameters = whole_parameters(made.model)
    return {"losses": losses, "norms": norms, "gradients": gradients if parameters is not None else None, "parameters": parameters}


class Watch(TorchDispatchMode):
    """Shows each operation on plain tensors, backward passes and those inside DTensors included, to `seen(name, outputs)`."""

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
def exchanges_of_graphs() -> Iterator[list[Counter[str]]]:
    """The exchanges, by kind, in each graph that is compiled meanwhile, forward and backward, once products have been joined to them."""
    found = list[Counter[str]]()
    rewrite = AsyncTensorParallel.__call__

    def seen(self: AsyncTensorParallel, graph: torch.fx.Graph) -> None:
        rewrite(self, graph)
        graph.lint()
        names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        found.append(Counter(name.split(".")[-2] for name in names if name.startswith(("tp_trainer", "_c10d")) and "wait" not in name))

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(force_disable_caches=True):
        patch.setattr(AsyncTensorParallel, "__call__", seen)
        yield found
    torch._dynamo.reset()
