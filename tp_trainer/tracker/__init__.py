"""Where a run's numbers go: metrics.jsonl, and TensorBoard, W&B or MLflow beside the run.

metrics.jsonl is written by rank 0 and belongs to the run: its errors end the training like any
other. The tracker is somebody's service: it has a process of its own, fed by the driver from a
queue (`Outside`), and whatever it does, no step and no end waits for it longer than is said there.
"""

from tp_trainer.tracker.metrics_file import MetricsFile
from tp_trainer.tracker.outside import Outside
from tp_trainer.tracker.services import PACKAGES, Row, Tracker, check_tracker

__all__ = ["PACKAGES", "MetricsFile", "Outside", "Row", "Tracker", "check_tracker"]
