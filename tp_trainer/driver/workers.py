"""A recipe on every worker, through Ray Train: the start, what rank 0 tells meanwhile, the end."""

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
from pathlib import Path
from typing import Any

from tp_trainer.checkpoint.store import Store
from tp_trainer.config import Config, ConfigError, Unrecoverable, plain
from tp_trainer.driver.ray_cluster import environment_of, no_collections, owns_ray
from tp_trainer.watch import hear_sigterm

POLL_SECONDS = 0.2


class Progress:
    """The actor between the workers, which push without waiting, and the driver, which polls. Asynchronous: `stopping` waits."""

    def __init__(self) -> None:
        self.items: list[tuple[float, dict[str, Any]]] = []
        self.stop = asyncio.Event()

    async def push(self, item: dict[str, Any]) -> None:
        self.items.append((time.monotonic(), item))

    async def drain(self) -> list[dict[str, Any]]:
        """What was pushed since the last time, each with its `age` in seconds."""
        items, self.items = self.items, []
        return [{**item, "age": time.monotonic() - at} for at, item in items]

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

    def drain(self) -> list[dict[str, Any]]:
        """What the workers have pushed since the last time; nothing while they can't be heard."""
        import ray

        try:
            items: list[dict[str, Any]] = ray.get(self.progress.drain.remote(), timeout=10)
        except ray.exceptions.RayError:
            return []  # the view may lag; fit() says how the run ends
        for item in items:
            if "worker" in item:
                self.pids.setdefault(item["node"], []).append(item["pid"])
        return [item for item in items if "worker" not in item]

    def stop(self) -> None:
        """Ask the workers to save and end; they do after the step that runs."""
        self.progress.ask_to_stop.remote()

    def kill(self) -> None:
        """SIGKILL to every worker, from its own node: what hangs or is stopped hears nothing else, Ray neither."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        task = ray.remote(num_cpus=0, max_retries=0)(_kill)
        done = [task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(pids)
                for node, pids in self.pids.items()]  # fmt: skip
        if done:
            ray.wait(done, num_returns=len(done), timeout=20)
        self.pids.clear()


def _kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(OSError):
            if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():  # not a process that was given its number since
                os.kill(pid, signal.SIGKILL)


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on each worker: the recipe that `settings` name.

    Refusals and what is unrecoverable, the same on every rank, are returned: a raised error would be tried again. Of an error
    Ray Train sends no trace along: it goes as a note.
    """
    os.environ.update(settings["environment"])  # before torch is imported

    module, _, name = settings["recipe"].partition(":")
    try:
        with no_collections():
            recipe = getattr(importlib.import_module(module), name)
        return recipe(settings)
    except ConfigError as error:
        return {"refused": (error.key, error.value, error.message)}
    except Unrecoverable as error:
        return {"unrecoverable": str(error)}
    except Exception as error:
        error.add_note(traceback.format_exc())
        raise


def fit(
    config: Config,
    recipe: str,
    settings: dict[str, Any],
    store: Store,
    take: Callable[[dict[str, Any]], None],
    tick: Callable[[Group], None] = lambda group: None,
) -> tuple[Exception | None, dict[str, Any] | None]:
    """Run a recipe on every worker and wait for its end. Nothing is tried again.

    Args:
        recipe: `module:function`, imported on the worker; it is given `settings`, `config` (plain) and `progress`.
        store: of the run's directory.
        take: is given what the workers push to `progress`.
        tick: called every POLL_SECONDS meanwhile.

    Returns:
        the error that the workers failed with, or rank 0's return value.

    Raises:
        ConfigError: a worker refused.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpu, cluster = config.cluster.device == "gpu", config.cluster
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress = ray.remote(num_cpus=0)(Progress).options(scheduling_strategy=here).remote()
    environment = environment_of(cluster)
    values = plain(config)
    values["cluster"]["env"] = {}  # its values travel apart, to no log
    # Ray would take up what it remembers of this name; the storage itself says what there is
    store.remove("checkpoint_manager_snapshot.json")
    trainer = _trainer_class(owns_ray())(
        _worker,
        train_loop_config={
            **settings, "recipe": recipe, "config": values, "environment": environment, "progress": progress,
        },
        torch_config=_torch_config("cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.parallelism.world_size, use_gpu=gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
            accelerator_type=cluster.accelerator_type, placement_strategy="PACK",
        ),
        run_config=RunConfig(
            name=config.experiment_name, storage_path=config.checkpoint.storage_path,
            # whether to go on after a failure is for the driver to say: Ray doesn't know what progress is. What may go wrong
            # before the workers run (a port that is taken meanwhile, nodes that come late) it tries again by itself
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )  # fmt: skip
    error, result = _wait(trainer, Group(progress), take, tick)
    if result is not None and "refused" in result:
        raise ConfigError(*result["refused"])
    return error, result


def _trainer_class(own: bool) -> Any:
    """Ray Train's, without its actors that have nothing to do here: each is a process more beside the workers.

    One is for datasets of Ray Data. With a Ray of our `own` the one that asks an autoscaler for nodes goes as well; Train waits
    until it has started.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class Placed(FixedScalingPolicy):
        def _send_resource_request(self) -> None:
            pass

        _maybe_send_resource_request = _cancel_resource_request = _send_resource_request

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [each for each in super()._create_default_callbacks() if type(each).__name__ != "DatasetsCallback"]

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            if own and isinstance(arguments.get("scaling_policy"), FixedScalingPolicy):
                arguments["scaling_policy"] = Placed(self.scaling_config)
            return super()._initialize_and_run_controller(**arguments)

    return Trainer


def _torch_config(backend: str) -> Any:
    """Ray Train's, but for workers that hear SIGTERM: a handler can only be set on their main thread, where training isn't."""
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    class Backend(_TorchBackend):
        def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_training_start(worker_group, backend_config)
            worker_group.execute(hear_sigterm)

    class Hearing(TorchConfig):
        @property
        def backend_cls(self) -> type:
            return Backend

    return Hearing(backend=backend)


def _wait(
    trainer: Any, group: Group, take: Callable[[dict[str, Any]], None], tick: Callable[[Group], None]
) -> tuple[Exception | None, dict[str, Any] | None]:
    """`fit()` in a thread, so that the main one draws and hears signals. Returns the error, or rank 0's return value."""
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
        for item in group.drain():
            take(item)
        tick(group)
    for item in group.drain():
        take(item)
    return outcome.get("error"), outcome.get("result")
