"""How the driver has Ray Train start the workers."""

from __future__ import annotations

from tp_trainer.driver.workers import _trainer_class


def test_no_actor_for_datasets() -> None:
    """Nor a release of Ray Train in which the method has another name, so that ours is never called."""
    trainer = _trainer_class()
    callbacks = {type(each).__name__ for each in trainer(print)._create_default_callbacks()}
    usual = {type(each).__name__ for each in super(trainer, trainer(print))._create_default_callbacks()}
    assert usual - callbacks == {"DatasetsCallback"} and "BackendSetupCallback" in callbacks
