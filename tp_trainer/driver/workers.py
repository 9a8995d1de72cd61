"""Running a recipe on every worker through Ray Train, and hearing what rank 0 tells meanwhile."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tp_trainer.checkpoint.store import Store
from tp_trainer.config import (
    Config,
    ConfigError,
    OutOfMemory,
    Unrecoverable,
    load,
    out_of_memory,
    permanent,
)
from tp_trainer.driver.errors import RunFailed, failure, ran_out, refusal
from tp_trainer.driver.ray_cluster import no_collections
from tp_trainer.driver.trainer import torch_trainer
from tp_trainer.messages import Message, ModelBuilt, Start, WorkerStarted
from tp_trainer.view import path_line
from tp_trainer.watch import stage

POLL_SECONDS = 0.2


class Progress:
    """The actor between the workers, which push without waiting, and the driver, which polls.
    Asynchronous: `stopping` waits.
    """

    def __init__(self) -> None:
        self.items: list[tuple[float, Message]] = []  # when they came
        self.gone = 0  # how many were before them
        self.stop = asyncio.Event()

    async def push(self, message: Message) -> None:
        self.items.append((time.monotonic(), message))

    async def drain(self, taken: int) -> list[tuple[Message, float]]:
        """What was pushed after the first `taken` messages of all, each with its age in seconds;
        those before are let go.

        An answer may be late, and then nobody takes it: what it held is there to be asked for
        again.
        """
        del self.items[: taken - self.gone]
        self.gone = taken
        return [(message, time.monotonic() - at) for at, message in self.items]

    async def ask_to_stop(self) -> None:
        self.stop.set()

    async def stopping(self) -> bool:
        """Answers when the run is to stop, and not before."""
        return await self.stop.wait()


class Group:
    """The workers of one `fit`, as the driver reaches them."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.pids: dict[str, list[int]] = {}  # by node
        self.taken = 0  # of what the workers have pushed

    def drain(self) -> list[tuple[Message, float]]:
        """What the workers have pushed since the last time, with its age in seconds; nothing while
        they can't be heard.
        """
        import ray

        try:
            items: list[tuple[Message, float]] = ray.get(
                self.progress.drain.remote(self.taken), timeout=10
            )
        except ray.exceptions.RayActorError:
            self.kill()  # it is gone, and with it what one knows of a run: as when a worker is gone
            return []
        except ray.exceptions.RayError:
            return []  # the view may lag; fit() says how the run ends
        self.taken += len(items)
        for message, _ in items:
            if isinstance(message, WorkerStarted):
                self.pids.setdefault(message.node, []).append(message.pid)
        return [item for item in items if not isinstance(item[0], WorkerStarted)]

    def stop(self) -> None:
        """Ask the workers to save and end; they do after the step that runs."""
        self.progress.ask_to_stop.remote()

    def kill(self) -> None:
        """SIGKILL to every worker, from its own node: what hangs or is stopped hears nothing else,
        Ray neither.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(num_cpus=0, max_retries=0)(_kill)
        done = [
            task.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(pids)
            for node, pids in self.pids.items()
        ]
        if done:
            ray.wait(done, num_returns=len(done), timeout=20)
        self.pids.clear()


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(OSError):
            # not a process that was given its number since
            if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


def _worker(settings: dict[str, Any]) -> Any:
    """What Ray Train runs on each worker: the recipe that `settings` name.

    Every error is raised, if on one rank alone: Ray Train then ends the others, which may wait for
    that one in a collective. What would repeat for certain is raised as Unrecoverable. Of an error
    Ray Train sends no trace along: it goes as a note.

    Raises:
        ConfigError: refused.
        OutOfMemory: a leaner start may do.
        Unrecoverable: a restart would come to the same.
        Exception: whatever else the recipe raises.
    """
    os.environ.update(settings["environment"])  # before torch is imported

    module, _, name = settings["recipe"].partition(":")
    start: Start = settings["start"]
    try:
        with no_collections():
            recipe = getattr(importlib.import_module(module), name)
        return recipe(load(settings["config"]), start, settings["progress"])
    except ConfigError:
        raise
    except Exception as error:
        lasts = permanent(error, stage(again=bool(start.restarts)))
        text = (
            str(error) if isinstance(error, Unrecoverable) else f"{type(error).__name__}: {error}"
        )
        raised = error
        if lasts:
            raised = (OutOfMemory if out_of_memory(error) else Unrecoverable)(text)
        raised.add_note(traceback.format_exc())
        raise raised from None


def fit(
    config: Config,
    recipe: str,
    start: Start,
    store: Store,
    take: Callable[[Message, float], None],
    tick: Callable[[Group], None] = lambda group: None,
) -> tuple[Exception | None, Any]:
    """Run a recipe on every worker and wait for its end. Nothing is tried again.

    Args:
        recipe: `module:function`, imported on the worker; it is given the config, `start`, and
            the actor that it pushes messages to.
        store: of the run's directory.
        take: is given what the workers push, and how old it is in seconds.
        tick: called every POLL_SECONDS meanwhile.

    Returns:
        the error that the workers failed with or None, and rank 0's return value or None.

    Raises:
        ConfigError: a worker refused.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress = ray.remote(num_cpus=0)(Progress).options(scheduling_strategy=here).remote()
    # Ray would take up what it remembers of this name; the storage itself says what there is
    store.remove("checkpoint_manager_snapshot.json")
    trainer = torch_trainer(_worker, config, recipe, start, progress)
    error, result = _wait(trainer, Group(progress), take, tick)
    if (refused := refusal(error)) is not None:
        raise refused
    return error, result


LEANER = (
    "out of memory at the first step: starting once more, without the fast paths that hold memory"
)


def fit_once(
    config: Config,
    recipe: str,
    start: Start,
    store: Store,
    take: Callable[[Message, float], None],
) -> Any:
    """`fit`, of a task that has nothing to go on with. Says which fast paths are taken; memory that
    runs out at first is tried with fewer of them.

    Returns:
        rank 0's return value.

    Raises:
        ConfigError: a worker refused.
        RunFailed: a worker failed.
    """
    leaner = True

    def hear(message: Message, age: float) -> None:
        nonlocal leaner
        if isinstance(message, ModelBuilt):
            leaner = message.leaner
            print(f"  {path_line(message.fast_paths)}", flush=True)
        take(message, age)

    error, result = fit(config, recipe, start, store, hear)
    if error is not None and ran_out(error) and leaner:
        print(LEANER, flush=True)
        error, result = fit(config, recipe, replace(start, lean=True), store, hear)
    if error is not None:
        raise RunFailed(failure(error, store))
    return result


def _wait(
    trainer: Any,
    group: Group,
    take: Callable[[Message, float], None],
    tick: Callable[[Group], None],
) -> tuple[Exception | None, Any]:
    """`fit()` in a thread, so that the main one draws and hears signals. Returns the error, or rank
    0's return value.
    """
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit().return_value
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        for message, age in group.drain():
            take(message, age)
        tick(group)
    for message, age in group.drain():
        take(message, age)
    return outcome.get("error"), outcome.get("result")
