"""summary.json, key for key."""

from __future__ import annotations

from typing import Literal, TypedDict

from tp_trainer.messages import DataFound


class TrackerError(TypedDict):
    """What went wrong with a tracker."""

    tracker: str
    reason: str
    since_step: int
    lost_rows: int


class PathTaken(TypedDict):
    """Whether a fast path was taken, and why."""

    on: bool
    why: str


class Summary(TypedDict, total=False):
    """The contents of summary.json. What a run never came to know is null or left out."""

    status: Literal["finished", "stopped", "failed", "refused"]
    steps: int
    tokens: int  # label tokens trained on
    loss: float | None  # nats per label token, as last logged
    validation_loss: float | None
    unigram_loss: float | None  # of the best model that knows frequencies alone
    wall_seconds: float  # since the command began
    startup_seconds: float  # of them, until the first step began
    tokens_per_second: float | None  # of all workers
    restarts: int
    resumed_from: int | None  # the checkpoint's step
    skipped_checkpoints: list[str]  # that were passed over, and why
    checkpoint: str | None  # the last one's path
    world: int  # workers
    mesh: dict[str, int] | None  # axis -> size
    skipped_steps: int
    failed_saves: int
    checkpoint_pause_seconds: float | None  # mean, that training stood still for a checkpoint
    failures: list[str]
    detection_seconds: list[float]  # of each failure: from the last sign of life
    restart_seconds: list[float]  # from there to the first step that was done again
    steps_lost: int  # that had to be done again
    goodput: float  # the time of the steps that count over the wall time
    missing_checkpoints: list[str]
    model: str | None
    data: DataFound | None
    fast_paths: dict[str, PathTaken]  # by their names in conf/parallelism
    tracker_error: TrackerError | None
    run_dir: str
    device: str  # cpu or gpu
    random_data: bool
    tracker: str  # tracker.kind
    run_length: dict[str, int | None]  # the keys of train that say when a run is over
    resume_command: str | None  # of a run that has not finished
