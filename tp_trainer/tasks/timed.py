"""The ranks' half of task=bench: the training loop itself, with hooks that look at the clock."""

from __future__ import annotations

import gzip
import hashlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from typing import Any, TypedDict

import torch
import torch.distributed as dist

from tp_trainer.batch import Batch
from tp_trainer.checkpoint.store import Store
from tp_trainer.config import RUN_LENGTH, Config, architecture, plain
from tp_trainer.config.identity import INTERVALS
from tp_trainer.data import Cursor
from tp_trainer.loop import Hooks, Position, train
from tp_trainer.messages import BenchResult, Evaluated, StepLogged, StepSkipped
from tp_trainer.metrics import flops_per_token, mfu, peak_flops, peak_memory_gib
from tp_trainer.parallel.agreement import STOP
from tp_trainer.parallel.shard import dtypes
from tp_trainer.recipe import Run
from tp_trainer.tasks.trace import DATA, split

Mark = torch.cuda.Event | float


def timed_steps(run: Run, trace: str, begun: Callable[[], None]) -> BenchResult:
    """Train as `bench` says.

    Args:
        run: its `data` is watched from now on.
        trace: the name of rank 0's trace, in the run's directory.
        begun: called when the first step is done.

    Returns:
        this rank's times, and of them what `rates` makes of their median; the peak memory before
        the profiler; where the time went on rank 0, else None.
    """
    config, mesh, data = run.config, run.mesh, run.data
    clock = Clock(config, mesh.device, profiled=dist.get_rank() == 0, begun=begun)
    fetch = data.step

    def fetched(cursor: Cursor) -> tuple[list[Batch], Cursor]:
        with torch.profiler.record_function(DATA):
            return fetch(cursor)

    data.step = fetched  # type: ignore[method-assign]
    try:
        outcome = train(config, run.model, run.optimizer, data, mesh, Position(), clock.hooks)
    finally:
        clock.close()
    peaks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, clock.peak_gib)
    parts = clock.trace(Store(config.run_dir), trace) if clock.profiler is not None else None
    seconds, tokens = clock.seconds(), outcome.position.tokens // outcome.position.step
    return BenchResult(
        seconds=seconds,
        **rates(
            config,
            run.model.matmul_weights,
            statistics.median(seconds),
            tokens,
            peak_flops(mesh.device),
        ),
        peak_gib=max(peaks),
        split=parts,
        trace=f"{config.run_dir}/{trace}" if clock.profiler else None,
        environment=environment(config, mesh.device),
    )


class Clock:
    """The loop's hooks: a mark after each step, no wait for the device; the profiler after the
    steps that are timed.
    """

    def __init__(
        self, config: Config, device: torch.device, profiled: bool, begun: Callable[[], None]
    ) -> None:
        bench = config.bench
        self.first, self.last, self.end = bench.warmup, bench.warmup + bench.steps, bench.all_steps
        self.device, self.begun = device, begun
        self.marks: list[Mark] = []
        self.step, self.peak_gib = 0, 0.0
        self.profiler: torch.profiler.profile | None = None
        # closed by close()
        self.file = tempfile.NamedTemporaryFile(suffix=".json.gz")  # noqa: SIM115
        if profiled and bench.profile_steps:
            # one step that is thrown away, since the profiler starts in it, and the lead that
            # `split` wants
            self.profiler = torch.profiler.profile(
                schedule=torch.profiler.schedule(
                    wait=0, warmup=1, active=1 + bench.profile_steps, repeat=1
                ),
                on_trace_ready=lambda profiler: profiler.export_chrome_trace(self.file.name),
            )

    @property
    def hooks(self) -> Hooks:
        # ended by a wish, the loop doesn't evaluate; nothing is saved
        return Hooks(
            log=self.log,
            stepped=self.stepped,
            save=lambda *_: None,
            wishes=lambda: STOP if self.step + 1 == self.end else 0,
        )

    def log(self, row: StepLogged | Evaluated | StepSkipped) -> None:
        if row.step == 1:  # the loop has waited for it
            self.begun()

    def stepped(self, step: int) -> None:
        self.step = step
        if self.first <= step <= self.last:
            self.marks.append(self.mark())
        if step == self.last:
            self.peak_gib = peak_memory_gib(self.device)
        if self.profiler is not None and step == self.last:
            self.profiler.start()
        elif self.profiler is not None and step > self.last:
            self.profiler.step()

    def mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        """Of each timed step: from the end of the step before it to its own, on the device where
        there is one.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return [seconds_between(one, other) for one, other in pairwise(self.marks)]

    def close(self) -> None:
        if self.profiler is not None and self.step >= self.last:
            self.profiler.stop()

    def trace(self, store: Store, name: str) -> dict[str, float | None] | None:
        """Put the trace into the run's directory and read it. Returns where the time went."""
        with gzip.open(self.file.name) as file:
            events = json.load(file)["traceEvents"]
        target = f"{store.root}/{name}"
        store.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        store.fs.put_file(self.file.name, target)
        return split(events)


def seconds_between(one: Mark, other: Mark) -> float:
    if isinstance(one, float) or isinstance(other, float):
        # marks of one device are of one kind
        return float(other) - float(one)  # type: ignore[arg-type]
    return one.elapsed_time(other) / 1e3


class Rates(TypedDict):
    tokens_per_second_per_gpu: float
    tokens_per_second: float
    mfu: float | None  # a fraction
    mfu_causal: float | None


def rates(config: Config, weights: int, seconds: float, tokens: int, peak: float | None) -> Rates:
    """Of a step of `seconds` with `tokens` in all: tokens/s and MFU (see metrics)."""
    each = tokens / seconds / config.parallelism.world_size
    numbers, length = architecture(config), config.data.seq_length
    return {
        "tokens_per_second_per_gpu": each,
        "tokens_per_second": tokens / seconds,
        "mfu": mfu(each, flops_per_token(weights, numbers, length), peak),
        "mfu_causal": mfu(each, flops_per_token(weights, numbers, length, causal=True), peak),
    }


def environment(config: Config, device: torch.device) -> dict[str, object]:
    """What the figures depend on besides the code, and a hash of it all: equal hashes can be
    compared.
    """
    gpu = device.type == "cuda"
    values = plain(config)
    train = {
        key: value for key, value in values["train"].items() if key not in (*RUN_LENGTH, *INTERVALS)
    }
    compute, reduce = (
        str(each).removeprefix("torch.") for each in dtypes(config.parallelism, device)
    )
    known: dict[str, object] = {
        "device": torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU",
        "count": config.parallelism.world_size,
        "threads": None if gpu else torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
        "transformers": version("transformers"),
        "ray": version("ray"),
        "compute": compute,
        "reduce": reduce,
        "parallelism": values["parallelism"],
        "train": train,
        "optim": values["optim"],
        "data": {key: values["data"][key] for key in ("source", "seq_length")},
        "architecture": values["model"]["architecture"],
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return {**known, "hash": digest}
