"""On the path of the program under test: what the file named by TP_TEST_HOOK orders is done in each
worker.

Python imports a `sitecustomize` by itself at its start. The orders are followed at the moment when
Ray Train's worker function imports the recipe: its environment is set by then, and nothing of the
training has begun.

    {"tell": directory}                  write what this worker sees of its environment there
    {"forget": run's directory}          take away the file that marks the driver's storage
    {"slow": seconds, "from": step}      every step of this start from that one on lasts longer
    {"crash": step, "rank": rank}        raise in that step, counted from this start of the workers
    {"break": "tp_trainer.optim:build_optimizer", "rank": rank}
                                         raise a ValueError where that function is called
    {"at": {"7": "raise"}, "rank": rank, "marks": directory}
                                         in that step of the run a fault, once if there is a
                                         directory for marks, else each time: raise; hang, in a
                                         sleep; kill, by SIGKILL; killsave, while its checkpoint is
                                         written
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
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
    from tp_trainer import loop, session

    rank = ray.train.get_context().get_world_rank()
    if "tell" in orders:
        seen = {"environ": dict(os.environ), "package": tp_trainer.__file__}
        Path(orders["tell"], f"rank{rank}.json").write_text(json.dumps(seen))
    if "forget" in orders:
        for path in Path(orders["forget"]).glob(".launch-*"):
            path.unlink(missing_ok=True)
    if "break" in orders and orders["rank"] == rank:
        module, _, name = orders["break"].partition(":")

        def broken(*arguments: Any, **more: Any) -> None:
            raise ValueError("as ordered:\nthis can't be built")

        setattr(importlib.import_module(module), name, broken)
    original, steps, done = loop.train_step, 0, 0
    begin, stepped, save = session.Reporter.begin, session.Reporter.stepped, session.Reporter.save

    def ordered(kind: str, step: int) -> bool:
        """Whether this goes wrong in that step of the run, on this rank, now."""
        if orders.get("at", {}).get(str(step)) != kind or orders.get("rank", rank) != rank:
            return False
        if "marks" in orders:
            mark = Path(orders["marks"], f"{step}-{kind}")
            if mark.exists():
                return False
            mark.touch()
        return True

    def beginning(self: Any, step: int, *rest: Any) -> None:
        nonlocal done
        done = step
        begin(self, step, *rest)

    def counting(self: Any, step: int) -> None:
        nonlocal done
        done = step
        stepped(self, step)

    def saving(self: Any, *arguments: Any, **more: Any) -> None:
        if ordered("killsave", done):
            threading.Timer(
                orders.get("after", 0.02), os.kill, (os.getpid(), signal.SIGKILL)
            ).start()
        save(self, *arguments, **more)

    def train_step(*arguments: Any, **more: Any) -> Any:
        nonlocal steps
        steps += 1
        if "slow" in orders and steps >= orders.get("from", 1):
            time.sleep(orders["slow"])
        if orders.get("crash") == steps and orders["rank"] == rank:
            raise ArithmeticError("as ordered:\nthe step went wrong")
        if ordered("raise", done + 1):
            raise ArithmeticError("as ordered:\nthe step went wrong")
        if ordered("kill", done + 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if ordered("hang", done + 1):
            time.sleep(3600)
        return original(*arguments, **more)

    if {"slow", "crash", "at"} & set(orders):
        loop.train_step = train_step
    if "at" in orders:
        session.Reporter.begin = beginning  # type: ignore
        session.Reporter.stepped = counting  # type: ignore
        session.Reporter.save = saving  # type: ignore


if "TP_TEST_HOOK" in os.environ:
    sys.meta_path.insert(0, Hook())  # type: ignore[arg-type]
