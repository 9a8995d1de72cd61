"""On the path of the program under test: what the file named by TP_TEST_HOOK orders is done in each worker.

Python imports a `sitecustomize` by itself at its start. The orders are followed at the moment when Ray Train's worker
function imports the recipe: its environment is set by then, and nothing of the training has begun.

    {"tell": directory}                  write what this worker sees of its environment there
    {"forget": run's directory}          take away the file by which workers know the driver's storage
    {"slow": seconds, "from": step}      every step of this start of the program lasts that much longer, from that one on
    {"crash": step, "rank": rank}        raise in that step
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

RECIPE = "tp_trainer.worker"


class Hook:
    """An import hook that finds nothing: it only sees the recipe's import coming."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == RECIPE and self in sys.meta_path:
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            follow(json.loads(Path(os.environ["TP_TEST_HOOK"]).read_text()))


def follow(orders: dict[str, Any]) -> None:
    import ray.train

    import tp_trainer
    from tp_trainer import loop

    rank = ray.train.get_context().get_world_rank()
    if "tell" in orders:
        seen = {"environ": dict(os.environ), "package": tp_trainer.__file__}
        Path(orders["tell"], f"rank{rank}.json").write_text(json.dumps(seen))
    if "forget" in orders:
        for path in Path(orders["forget"]).glob(".launch-*"):
            path.unlink(missing_ok=True)
    original, steps = loop.train_step, 0

    def train_step(*arguments: Any, **more: Any) -> Any:
        nonlocal steps
        steps += 1
        if "slow" in orders and steps >= orders.get("from", 1):
            time.sleep(orders["slow"])
        if orders.get("crash") == steps and orders["rank"] == rank:
            raise ArithmeticError("as ordered:\nthe step went wrong")
        return original(*arguments, **more)

    if "slow" in orders or "crash" in orders:
        loop.train_step = train_step


if "TP_TEST_HOOK" in os.environ:
    sys.meta_path.insert(0, Hook())  # type: ignore[arg-type]
