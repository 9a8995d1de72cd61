"""The schema's groups for what lies around a training: checkpoints, cluster, tracker, other
tasks."""

from __future__ import annotations

from dataclasses import dataclass

from tp_trainer.config.setting import DTYPES, setting


@dataclass
class Checkpoint:
    storage_path: str = setting(
        "outputs", "where runs live: a local or shared directory, or a URL such as s3://bucket/runs"
    )
    interval: int | str | None = setting(
        100,
        "steps between checkpoints; auto = by the clock, from pause and mtbf_hours; null = at the"
        " end only",
        least=1,
        one_of=("auto",),
    )
    mtbf_hours: float = setting(
        24.0,
        "hours from one failure of the run to the next that you expect; interval=auto needs it",
        above=0,
    )
    asynchronous: bool = setting(
        True, "write checkpoints while training goes on, from a copy; false = training waits"
    )
    keep_last: int = setting(2, "how many checkpoints to keep, the newest", least=1)
    keep_every: int | None = setting(
        None, "keep those whose step is divisible by this as well; null = none", least=1
    )
    keep_best: int = setting(
        0, "how many to keep as well of those with the lowest validation loss", least=0
    )
    resume: str = setting("auto", "auto, never, or the path of a checkpoint")
    allow_mismatch: list[str] = setting(
        [], "keys in which a resume may differ from the checkpoint's run, e.g. [optim.lr,data]"
    )
    path: str | None = setting(None, "task=export: the checkpoint to export")


@dataclass
class Cluster:
    kind: str = setting(
        "local", "how Ray is reached", one_of=("local", "ray", "anyscale", "kuberay")
    )
    address: str | None = setting(None, "ray: the running cluster's address; null = auto")
    device: str = setting("auto", "auto = GPUs where there are any", one_of=("auto", "cpu", "gpu"))
    num_workers: int | None = setting(
        None, "derived (tp x dp); where stated it must agree", least=1
    )
    cpus_per_worker: float = setting(1, "CPUs that Ray reserves for each worker", above=0)
    accelerator_type: str | None = setting(
        None, "the GPU model that Ray must place workers on, e.g. H100"
    )
    wait_seconds: float = setting(
        0, "how long to wait until a growing cluster has the workers' CPUs and GPUs", least=0
    )
    max_failures: int = setting(
        3, "restarts in a row after failures with no step further between them", least=0
    )
    hang_seconds: float | None = setting(
        900,
        "a rank without a sign of life for so long hangs (4 times that until the first step is"
        " done): restart; null = off",
        above=0,
    )
    stop_seconds: float = setting(
        120,
        "how long SIGTERM or Ctrl-C waits for a sign of life before it ends the run unsaved",
        above=0,
    )
    env: dict[str, str] = setting({}, "environment of the workers and the tracker; never logged")


@dataclass
class Tracker:
    kind: str = setting(
        "tensorboard",
        "where metrics go besides metrics.jsonl",
        one_of=("tensorboard", "wandb", "mlflow", "none"),
    )
    project: str = setting("tp_trainer", "W&B project or MLflow experiment")
    uri: str | None = setting(
        None, "MLflow tracking server; null = a database in the run's directory"
    )


@dataclass
class Export:
    output: str | None = setting(
        None,
        "the directory to write, as transformers' save_pretrained would; of a training: at its end",
    )
    dtype: str = setting("bfloat16", "dtype of the exported weights", one_of=DTYPES)
    max_shard_gib: float = setting(5.0, "size of one safetensors file, GiB", above=0)


@dataclass
class Verify:
    steps: int = setting(5, "task=verify: optimizer steps that are compared", least=1)
    layers: int | None = setting(2, "decoder layers of the compared model; null = all", least=1)
    lr: float = setting(1e-5, "learning rate of the compared steps", least=0)
    reference_dtype: str | None = setting(
        None,
        "dtype of the one process's compute; null = the run's. float64 tells whose rounding it is",
        one_of=("float32", "float64"),
    )
    tolerance: float | None = setting(
        None,
        "relative difference of the loss that passes; null = 1e-6 in float32, 2e-3 in lower"
        " precision",
        above=0,
    )


@dataclass
class Bench:
    warmup: int = setting(
        10, "task=bench: steps before those that are timed; the first one compiles", least=1
    )
    steps: int = setting(20, "steps that are timed", least=1)
    profile_steps: int = setting(
        2, "steps that are profiled after those, for where the time goes; 0 = none", least=0
    )
    output: str | None = setting(
        None, "the file to append a line of JSON to; null = bench.jsonl in checkpoint.storage_path"
    )

    @property
    def all_steps(self) -> int:
        """The profiler takes two more: one to start in, and a lead (see tasks/trace.py)."""
        return self.warmup + self.steps + (self.profile_steps + 2 if self.profile_steps else 0)
