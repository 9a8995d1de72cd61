"""What passes between the driver and its workers, a frozen dataclass for each message.

The driver gives a `Start`; the workers push a `Message` whenever there is something to tell, and
rank 0 answers with a `TrainingResult` (or another task's) at the end. Neither torch nor Ray is
needed to read them. Times are in seconds, steps are optimizer steps and count from 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict


@dataclass(frozen=True)
class Start:
    """What a recipe is given besides the config."""

    launch: str  # the name of this start of the program
    tokenizer: str  # as the driver chose it; "none": random tokens
    restarts: int = 0  # how often this command's workers have been restarted
    lean: bool = False  # without the fast paths that hold memory, since it ran out with them
    trace: str | None = None  # of a bench: the file for rank 0's trace, in the run's directory


# ------------------------------------------------------------------------------- from every worker


@dataclass(frozen=True)
class WorkerStarted:
    """A process of a rank, and where it runs."""

    rank: int
    node: str  # Ray's id of the node
    pid: int


# ---------------------------------------------------------------------- from rank 0, of a training


@dataclass(frozen=True)
class Alive:
    """A sign of life."""

    limit: float | None  # seconds within which the next one comes; None: unlimited


class PartFound(TypedDict):
    """What was found of the training or validation part of the data."""

    documents: int
    documents_skipped: int
    skipped: dict[str, int]  # why -> how many documents
    first_skipped: list[str]  # where the first of them lie
    tokens: int
    rows: int
    tokens_dropped: int  # at the end, too few for a row


class DataFound(TypedDict, total=False):
    """What was found of the data; of random tokens the `source` alone."""

    source: str | None
    name: str | None
    revision: str | None  # the commit of a hub dataset
    files: int | None  # None: a hub dataset, whose files are its own affair
    files_ignored: int
    first_ignored: list[str]
    tokenizer: str
    train: PartFound
    validation: PartFound


@dataclass(frozen=True)
class FastPath:
    """Whether a fast path is taken, and why; an entry of summary.json's `fast_paths`."""

    on: bool
    why: str


@dataclass(frozen=True)
class ModelBuilt:
    """The model is on the mesh."""

    fast_paths: dict[str, FastPath]  # by their names in conf/parallelism
    leaner: bool  # whether a start with `lean` would leave any of them out


@dataclass(frozen=True)
class TrainingBegan:
    """Everything is built and restored; the first step comes next."""

    step: int  # that the run goes on from; 0: from the start
    total_steps: int
    device: str  # cpu or cuda
    model: str  # what is trained, in a line
    data: DataFound | None


@dataclass(frozen=True)
class StepDone:
    """A step is done, logged or not."""

    step: int
    seconds: float  # that it took, without evaluating and saving


@dataclass(frozen=True)
class StepLogged:
    """A row of metrics.jsonl about the training, key for key. Numbers that are none are None."""

    step: int
    epoch: int
    tokens: int  # label tokens trained on since the run's start
    loss: float | None  # nats per label token
    grad_norm: float | None  # global, before clipping
    lr: float
    tokens_per_second: float  # of all workers, since the row before
    tokens_per_second_per_worker: float
    mfu: float | None  # a fraction; None: the device's peak is not known
    memory_gib: float | None  # GiB, the peak of rank 0's device
    step_seconds: float  # mean since the row before


@dataclass(frozen=True)
class Evaluated:
    """A row of metrics.jsonl about an evaluation."""

    step: int
    validation_loss: float  # nats per label token


@dataclass(frozen=True)
class StepSkipped:
    """A row of metrics.jsonl about a step that was no step: parameters stayed as they were."""

    step: int
    skipped_steps: int  # so far, this one included


@dataclass(frozen=True)
class SaveBegan:
    """Training stands still for a checkpoint of this step."""

    step: int


@dataclass(frozen=True)
class SaveReturned:
    """Training goes on; what was copied may yet have to be written."""


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint counts. A row of metrics.jsonl, key for key."""

    step: int
    checkpoint_pause_seconds: float  # that training stood still
    checkpoint_seconds: float  # until all of it was written
    checkpoint_bytes: int


@dataclass(frozen=True)
class CheckpointFailed:
    """A checkpoint came to nothing; training goes on."""

    step: int
    reason: str


@dataclass(frozen=True)
class Notice:
    """Something to be said to the user, as it stands."""

    text: str


# ------------------------------------------------------------------ from rank 0, of the other tasks


Stage = Literal["workers", "model", "data", "first_step"]


@dataclass(frozen=True)
class StageDone:
    """A part of a bench's start-up is over."""

    stage: Stage


@dataclass(frozen=True)
class Pair:
    """A number of the parallel run, the reference's, and their relative difference."""

    parallel: float
    reference: float
    difference: float


@dataclass(frozen=True)
class StepCompared:
    """A step of task=verify; an entry of verify.json, key for key. Differences are relative."""

    step: int
    loss: Pair
    gradient_norm: Pair
    gradients: dict[str, float]  # parameter -> difference
    parameters: dict[str, float]
    drifted: list[str]  # replicated parameters that differ within a TP group


Message = (
    WorkerStarted
    | Alive
    | ModelBuilt
    | TrainingBegan
    | StepDone
    | StepLogged
    | Evaluated
    | StepSkipped
    | SaveBegan
    | SaveReturned
    | CheckpointSaved
    | CheckpointFailed
    | Notice
    | StageDone
    | StepCompared
)

# ----------------------------------------------------------------------------- rank 0's last answer


@dataclass(frozen=True)
class TrainingResult:
    """How a training ended. But for `ended` it goes into summary.json, key for key."""

    ended: Literal["finished", "stopped", "left"]  # left: a worker was told to end
    steps: int
    tokens: int  # label tokens trained on since the run's start
    loss: float | None
    validation_loss: float | None
    unigram_loss: float | None  # of the best model that knows frequencies alone
    skipped_steps: int
    tokens_per_second: float | None  # of all workers; None: this start trained no step
    resumed_from: int | None  # the checkpoint's step
    skipped_checkpoints: list[str]  # that were passed over, and why
    checkpoint_pause_seconds: float | None  # mean
    checkpoint: str | None  # the last one's path


@dataclass(frozen=True)
class BenchResult:
    """What rank 0 has measured in a bench."""

    seconds: list[float]  # of each timed step
    tokens_per_second_per_gpu: float
    tokens_per_second: float
    mfu: float | None  # a fraction
    mfu_causal: float | None  # with attention counted causally
    peak_gib: float  # the highest of all ranks
    split: dict[str, float | None] | None  # seconds of a step by what they went into
    trace: str | None  # the profiler's, a path
    environment: dict[str, Any]  # what the figures depend on besides the code


@dataclass(frozen=True)
class VerifyResult:
    """What rank 0 has compared in a verify."""

    rows: list[StepCompared]
    device: str
    dtypes: list[str]  # of compute and of gradient reduction
