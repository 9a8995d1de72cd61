"""The tasks: what `task=` may name, an entry of TASKS and a module with `run(config)` for each.

Importing this imports no task: they bring Ray, and most of them torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tp_trainer.config import Config


@dataclass(frozen=True)
class Objective:
    """The number of a task's result that sweepers minimise, and a sweep's table shows."""

    key: str  # of the result; where it is missing or None the task has come to nothing
    title: str  # of the table's column
    form: str
    sign: int = 1  # -1: more is better

    def of(self, result: dict[str, object]) -> float | None:
        """What is minimised."""
        value: Any = result.get(self.key)
        return None if value is None else self.sign * float(value)

    def shown(self, minimised: float) -> str:
        return self.form.format(self.sign * minimised)


LOSS = Objective("validation_loss", "validation loss", "{:.4f}")
RATE = Objective("tokens_per_second_per_gpu", "tokens/s per worker", "{:,.0f}", sign=-1)


@dataclass(frozen=True)
class Task:
    """One thing that the program does."""

    name: str
    help: str
    needs_ray: bool
    module: str
    objective: Objective = LOSS

    @property
    def run(self) -> Callable[[Config], dict[str, object]]:
        """Do it as the config says; gives what it came to, as written to its file."""
        function: Callable[[Config], dict[str, object]] = importlib.import_module(self.module).run
        return function


TASKS = {
    task.name: task
    for task in (
        Task(
            "train",
            "train a model; go on where an earlier start of the run has ended",
            needs_ray=True,
            module="tp_trainer.tasks.train",
        ),
        Task(
            "export",
            "write a checkpoint (checkpoint.path) as a directory that transformers loads"
            " (export.output)",
            needs_ray=True,
            module="tp_trainer.tasks.export",
        ),
        Task(
            "verify",
            "compare the layout, step by step, with plain transformers in one process",
            needs_ray=True,
            module="tp_trainer.tasks.verify",
        ),
        Task(
            "bench",
            "time the training loop in the layout, and tell where its time goes",
            needs_ray=True,
            module="tp_trainer.tasks.bench",
            objective=RATE,
        ),
    )
}


def help_lines() -> str:
    """What `--help` says of the tasks."""
    rows = [
        f"{task.name}: {task.help}{' [through Ray]' if task.needs_ray else ''}"
        for task in TASKS.values()
    ]
    return "\n".join(["== Tasks ==", "What is done (task=name)", "", *rows])
