"""How the driver has Ray Train start the workers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from tp_trainer.driver.trainer import _trainer_class


def test_no_actor_for_datasets() -> None:
    """Nor a release of Ray Train in which the method has another name, so that ours is never
    called.
    """
    trainer = _trainer_class(own=False)
    callbacks = {type(each).__name__ for each in trainer(print)._create_default_callbacks()}
    usual = {
        type(each).__name__ for each in super(trainer, trainer(print))._create_default_callbacks()
    }
    assert usual - callbacks == {"DatasetsCallback"} and "BackendSetupCallback" in callbacks


def test_a_ray_of_our_own_is_not_asked_for_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cluster nodes are asked for; of a Ray that has all it will ever have the actor for it
    isn't even started.
    """
    given: dict[str, Any] = {}

    def controller(self: TorchTrainer, **arguments: Any) -> Any:
        given.update(arguments)
        return SimpleNamespace(error=None)

    def actor() -> None:
        raise RuntimeError("the actor is started")

    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", controller)
    client = "ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client"
    monkeypatch.setattr(f"{client}.get_or_create_autoscaling_coordinator", actor)
    monkeypatch.setattr(
        f"{client}.logger.warning", lambda text, exc_info: pytest.fail("the actor is asked for")
    )

    _trainer_class(own=True)(print, scaling_config=ScalingConfig(num_workers=3)).fit()
    policy = given["scaling_policy"]
    policy.after_controller_start(SimpleNamespace(run_id="1"))
    decision = policy.make_decision_for_non_running_worker_group()
    policy.before_controller_abort()
    assert decision.num_workers == 3 and decision.resources_per_worker == {"CPU": 1}

    _trainer_class(own=False)(print, scaling_config=ScalingConfig(num_workers=3)).fit()
    assert type(given["scaling_policy"]) is FixedScalingPolicy
    with pytest.raises(pytest.fail.Exception, match="asked for"):
        given["scaling_policy"].after_controller_start(SimpleNamespace(run_id="1"))
