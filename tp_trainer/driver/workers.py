"""A recipe on every worker, through Ray Train: the start, what rank 0 tells meanwhile, the end."""

from __future__ import annotations

import importlib
import os
import threading
import traceback
from collections.abc import Callable
from typing import Any

from tp_trainer.checkpoint.store import Store
from tp_trainer.config import Config, ConfigError, Unrecoverable, plain
from tp_trainer.driver.ray_cluster import environment_of, sigterm_exits

POLL_SECONDS = 0.2


class Progress:
    """The actor between rank 0, which pushes without waiting, and the driver, which polls."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []

    def push(self, item: dict[str, Any]) -> None:
        self.items.append(item)

    def drain(self) -> list[dict[str, Any]]:
        items, self.items = self.items, []
        return items


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on each worker: the recipe that `settings` name.

    Refusals and drifts, the same on every rank, are returned: a raised error would be tried again. Of an error Ray Train
    sends no trace along: it goes as a note.
    """
    os.environ.update(settings["environment"])  # before torch is imported

    module, _, name = settings["recipe"].partition(":")
    try:
        return getattr(importlib.import_module(module), name)(settings)
    except ConfigError as error:
        return {"refused": (error.key, error.value, error.message)}
    except Unrecoverable as error:
        return {"drifted": str(error)}
    except Exception as error:
        error.add_note(traceback.format_exc())
        raise


def fit(
    config: Config, recipe: str, settings: dict[str, Any], store: Store, take: Callable[[dict[str, Any]], None]
) -> tuple[Exception | None, dict[str, Any] | None]:
    """Run a recipe on every worker and wait for its end.

    Args:
        recipe: `module:function`, imported on the worker; it is given `settings`, `config` (plain) and `progress`.
        store: of the run's directory.
        take: is given what rank 0 pushes to `progress`.

    Returns:
        the error that the workers failed with, or rank 0's return value.

    Raises:
        ConfigError: a worker refused.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpu, cluster = config.cluster.device == "gpu", config.cluster
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress = ray.remote(num_cpus=0)(Progress).options(scheduling_strategy=here).remote()
    environment = environment_of(cluster)
    values = plain(config)
    values["cluster"]["env"] = {}  # its values travel apart, to no log
    # Ray would take up what it remembers of this name; the storage itself says what there is
    store.remove("checkpoint_manager_snapshot.json")
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            **settings, "recipe": recipe, "config": values, "environment": environment, "progress": progress,
        },
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.parallelism.world_size, use_gpu=gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
            accelerator_type=cluster.accelerator_type, placement_strategy="PACK",
        ),
        run_config=RunConfig(
            name=config.experiment_name, storage_path=config.checkpoint.storage_path,
            failure_config=FailureConfig(max_failures=cluster.max_failures), checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )  # fmt: skip
    error, result = _wait(trainer, progress, take)
    if result is not None and "refused" in result:
        raise ConfigError(*result["refused"])
    return error, result


def _wait(trainer: Any, progress: Any, take: Callable[[dict[str, Any]], None]) -> tuple[Exception | None, dict[str, Any] | None]:
    """`fit()` in a thread, so that the main one draws and hears signals. Returns the error, or rank 0's return value."""
    import ray

    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit().return_value
        except BaseException as error:
            outcome["error"] = error

    def drain() -> None:
        try:
            for item in ray.get(progress.drain.remote(), timeout=10):
                take(item)
        except ray.exceptions.RayError:
            pass  # the view may lag; fit() says how the run ends

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    with sigterm_exits():
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            drain()
    drain()
    return outcome.get("error"), outcome.get("result")
