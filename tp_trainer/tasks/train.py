"""task=train: the training, then the export of its last checkpoint if `export.output` is given."""

from __future__ import annotations

import dataclasses

from tp_trainer import driver
from tp_trainer.config import Config
from tp_trainer.summary import Summary
from tp_trainer.tasks import export


def run(config: Config) -> Summary:
    """Train, then export. Raises as `driver.train` and `export.run` do; what stands in the way of
    the export is said before the training begins.
    """
    output = export.free_output(config.export.output) if config.export.output is not None else None
    summary = driver.train(config)
    if output is not None and summary["status"] == "finished":
        checkpoint = dataclasses.replace(config.checkpoint, path=summary["checkpoint"])
        export.run(
            dataclasses.replace(
                config,
                checkpoint=checkpoint,
                export=dataclasses.replace(config.export, output=output),
            )
        )
    return summary
