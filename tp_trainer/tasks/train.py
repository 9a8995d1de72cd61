"""task=train: the training, and the export of its last checkpoint where `export.output` asks for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from tp_trainer import driver
from tp_trainer.config import Config
from tp_trainer.tasks import export


def run(config: Config) -> dict[str, Any]:
    """Train, then export. Returns the training's summary; raises as `driver.train` and `export.run` do.

    What stands in the way of the export is said before the training begins.
    """
    output = export.free_output(config.export.output) if config.export.output is not None else None
    summary = driver.train(config)
    if output is not None and summary["status"] == "finished":
        checkpoint = dataclasses.replace(config.checkpoint, path=summary["checkpoint"])
        export.run(dataclasses.replace(config, checkpoint=checkpoint, export=dataclasses.replace(config.export, output=output)))
    return summary
