"""Ray Train's TorchTrainer, as this program wants it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tp_trainer.config import Config, plain
from tp_trainer.driver.ray_cluster import environment_of, owns_ray
from tp_trainer.launchers import forget
from tp_trainer.messages import Start
from tp_trainer.watch import hear_sigterm


def torch_trainer(
    worker: Callable[..., Any],
    config: Config,
    recipe: str,
    start: Start,
    progress: Any,
) -> Any:
    """Ray Train's trainer of this run: `worker` on as many workers as the mesh has places."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig

    gpu, cluster = config.cluster.device == "gpu", config.cluster
    values = plain(config)
    values["cluster"]["env"] = {}  # its values travel apart, to no log
    return _trainer_class(owns_ray())(
        worker,
        train_loop_config={
            "start": start,
            "recipe": recipe,
            "config": values,
            "environment": environment_of(cluster),
            "progress": progress,
        },
        torch_config=_torch_config("cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.parallelism.world_size,
            use_gpu=gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
            accelerator_type=cluster.accelerator_type,
            placement_strategy="PACK",
        ),
        run_config=RunConfig(
            name=config.experiment_name,
            storage_path=config.checkpoint.storage_path,
            # whether to go on after a failure is for the driver to say: Ray doesn't know what
            # progress is. What may go wrong before the workers run (a port that is taken meanwhile,
            # nodes that come late) it tries again by itself
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),
            checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )


def _trainer_class(own: bool) -> Any:
    """Ray Train's, without its actors that have nothing to do here: each is a process more beside
    the workers.

    One is for datasets of Ray Data. With a Ray of our `own` the one that asks an autoscaler for
    nodes goes as well; Train waits until it has started.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class Placed(FixedScalingPolicy):
        def _send_resource_request(self) -> None:
            pass

        _maybe_send_resource_request = _cancel_resource_request = _send_resource_request

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [
                each
                for each in super()._create_default_callbacks()
                if type(each).__name__ != "DatasetsCallback"
            ]

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            if own and isinstance(arguments.get("scaling_policy"), FixedScalingPolicy):
                arguments["scaling_policy"] = Placed(self.scaling_config)
            return super()._initialize_and_run_controller(**arguments)

    return Trainer


def _torch_config(backend: str) -> Any:
    """Ray Train's, but for workers that hear SIGTERM: a handler can only be set on their main
    thread, where training isn't. And that go by no launcher's variables, which a cluster's nodes
    may have been started with.
    """
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    class Backend(_TorchBackend):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(forget)
            super().on_start(worker_group, backend_config)

        def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_training_start(worker_group, backend_config)
            worker_group.execute(hear_sigterm)

    class Hearing(TorchConfig):
        @property
        def backend_cls(self) -> type:
            return Backend

    return Hearing(backend=backend)
