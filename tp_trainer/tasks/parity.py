"""The ranks' half of task=verify: the trainer's own parts and the reference, in step, compared on
rank 0.

Before each step rank 0 runs the reference's backward pass (the other ranks wait); every gradient
and parameter of the parallel model is then gathered one at a time.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from tp_trainer.config import Config
from tp_trainer.data import Cursor
from tp_trainer.loop import train_step
from tp_trainer.messages import Pair, StepCompared
from tp_trainer.models.model import ParallelModel
from tp_trainer.parallel.drift import drifted
from tp_trainer.parallel.mesh import Mesh
from tp_trainer.parallel.shard import dtypes
from tp_trainer.recipe import Run
from tp_trainer.tasks.reference import Reference

NORM_FLOOR = 1e-6  # of the global norm: below it a parameter's gradient is rounding alone
TINY = 1e-30  # where all is zero
NOT_FINITE = 1e30  # stands for the difference from what is no number


def compared_steps(run: Run, tokenizer: str) -> Iterator[StepCompared | None]:
    """Take `verify.steps` steps on all ranks, and give rank 0 the differences of each; other ranks
    get None.
    """
    config, mesh, model = run.config, run.mesh, run.model
    reference, cursor = _reference(config, mesh, model, tokenizer), Cursor()
    for step in range(1, config.verify.steps + 1):
        batches, cursor = run.data.step(cursor)
        expected = reference.backward() if reference else 0.0
        gradients: dict[str, float] = {}

        def compare_gradients(found: dict[str, float] = gradients) -> None:
            found.update(_differences(model, reference, gradient=True))

        loss, norm = train_step(
            model,
            run.optimizer,
            batches,
            mesh,
            config.train.clip_grad_norm,
            before_clipping=compare_gradients,
        )
        expected_norm = reference.update() if reference else 0.0
        parameters = _differences(model, reference, gradient=False)
        apart = drifted(model.named_parameters(), mesh)
        if reference is None:
            yield None
            continue
        yield StepCompared(
            step=step,
            loss=_pair(loss.item(), expected),
            gradient_norm=_pair(norm.item(), expected_norm),
            gradients=gradients,
            parameters=parameters,
            drifted=apart,
        )


def _reference(
    config: Config, mesh: Mesh, model: ParallelModel, tokenizer: str
) -> Reference | None:
    """The reference with the parallel model's weights, on rank 0; a collective.

    They go through safetensors files of one tensor each, so that no rank ever holds a second whole
    model for it.
    """
    first = dist.get_rank() == 0
    folder = (
        Path(
            tempfile.mkdtemp(
                prefix="weights-", dir=None if "://" in config.run_dir else config.run_dir
            )
        )
        if first
        else None
    )
    try:
        for number, (name, parameter) in enumerate(model.named_parameters()):
            whole = _whole(parameter)
            if folder is not None:
                save_file({name: whole.cpu().contiguous()}, folder / f"{number:06d}.safetensors")
        if folder is None:
            return None
        given = config.verify.reference_dtype
        dtype = getattr(torch, given) if given else dtypes(config.parallelism, mesh.device)[0]
        return Reference(config, folder, tokenizer, dtype, mesh.device)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; a collective."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _differences(
    model: ParallelModel, reference: Reference | None, gradient: bool
) -> dict[str, float]:
    """Each parameter's (or gradient's) norm of difference over norm, on rank 0; a collective."""
    pick: Callable[[torch.Tensor], torch.Tensor | None] = (
        (lambda p: p.grad) if gradient else (lambda p: p)
    )
    floor = 0.0
    if reference is not None:
        norms = [
            _norm(each) for each in map(pick, reference.parameters.values()) if each is not None
        ]
        floor = NORM_FLOOR * torch.stack(norms).norm().item()
    found: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        picked = pick(parameter)
        got = torch.zeros_like(_whole(parameter)) if picked is None else _whole(picked)
        if reference is not None:
            own = pick(reference.parameters[name])
            want = torch.zeros_like(got) if own is None else own
            found[name] = _finite((_norm(got - want) / max(_norm(want).item(), floor, TINY)).item())
    return found


def _norm(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64)


def _pair(parallel: float, reference: float) -> Pair:
    difference = _finite(abs(parallel - reference) / max(abs(reference), TINY))
    return Pair(_finite(parallel), _finite(reference), difference)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else NOT_FINITE


__all__ = ["NOT_FINITE", "compared_steps"]
