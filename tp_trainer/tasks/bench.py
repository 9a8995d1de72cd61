"""task=bench: how fast the training loop is in the chosen layout, and where its time goes.

The loop is the real one, on the workers through Ray, with random weights and nothing saved, tracked
or evaluated. A line of JSON with every figure, the command, the commit and the environment is
appended to `bench.output`.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

from tp_trainer.checkpoint.store import Store
from tp_trainer.config import Config, ConfigError, architecture, load, plain
from tp_trainer.config.identity import model_name
from tp_trainer.driver import fit_once, prepare, started
from tp_trainer.messages import BenchResult, Message, Stage, StageDone, Start

LR = 1e-7  # nothing is to be learned, and nothing to diverge
# of the start-up, in their order
STAGES = ("compose", "ray", "workers", "model", "data", "first_step")


class BenchLine(TypedDict):
    """A line of `bench.output`, key for key."""

    date: str  # ISO 8601
    cell: str  # see `cell`
    program: str
    model: str
    layers: int
    tokens_per_second_per_gpu: float
    tokens_per_second: float
    mfu: float | None  # a fraction
    mfu_causal: float | None  # with attention counted causally
    peak_gib: float  # the highest of all ranks
    split: dict[str, float | None] | None  # see trace.split
    trace: str | None  # a path
    environment: dict[str, Any]  # see timed.environment
    step_seconds: dict[str, float]  # see `spread`
    timed_steps: int
    startup_seconds: dict[str, float]  # by STAGES
    command: str
    commit: str | None


def run(config: Config) -> BenchLine:
    """Time the steps, append a line to `bench.output` and print the figures.

    Raises:
        ConfigError: refused before anything starts.
        RunFailed: a worker failed.
    """
    moments = [_process_began(), time.time()]
    output = writable(
        config.bench.output or f"{config.checkpoint.storage_path.rstrip('/')}/bench.jsonl"
    )
    config, tokenizer, notice, store = prepare(benched(config))
    numbers, bench, now = architecture(config), config.bench, datetime.datetime.now().astimezone()
    print(
        f"bench: {numbers.model_type}, {numbers.num_hidden_layers} layers of width"
        f" {numbers.hidden_size}, {config.parallelism.layout}; {bench.warmup} + {bench.steps} steps"
        f" of {config.train.global_batch_size} x {config.data.seq_length} tokens"
    )
    print(f"  weights: random{f'; {notice}' if notice else ''}", flush=True)

    def take(message: Message, age: float) -> None:
        if isinstance(message, StageDone):
            moments.append(time.time() - age)

    with started(config, store) as owner:
        moments.append(time.time())
        trace = f"profile/{now:%Y%m%d-%H%M%S}-{owner.launch}.json.gz"
        start = Start(owner.launch, tokenizer, trace=trace)
        result = fit_once(config, "tp_trainer.tasks.bench:work", start, store, take)
    assert isinstance(result, BenchResult)
    seconds = result.seconds
    row: BenchLine = {
        "date": now.isoformat(timespec="seconds"),
        "cell": cell(config),
        "program": "ours",
        "model": model_name(config),
        "layers": numbers.num_hidden_layers,
        "tokens_per_second_per_gpu": result.tokens_per_second_per_gpu,
        "tokens_per_second": result.tokens_per_second,
        "mfu": result.mfu,
        "mfu_causal": result.mfu_causal,
        "peak_gib": result.peak_gib,
        "split": result.split,
        "trace": result.trace,
        "environment": result.environment,
        "step_seconds": spread(seconds),
        "timed_steps": len(seconds),
        "startup_seconds": dict(
            zip(STAGES, (after - before for before, after in pairwise(moments)), strict=False)
        ),
        "command": command(sys.argv),
        "commit": commit(Path(__file__).parent),
    }
    append(output, row)
    print(lines(row), f"  {'line':<12}{output}", sep="\n", flush=True)
    return row


def benched(config: Config) -> Config:
    """The config of the timed run. Its files go to <run>/bench, so that a training run of the name
    stays as it is.
    """
    values, steps = plain(config), config.bench.all_steps
    values["model"] |= {"weights": "random", "overrides": {}}
    values["optim"] |= {"lr": LR, "schedule": "constant", "warmup_steps": 0, "decay_steps": None}
    values["train"] |= {
        "max_steps": steps + 1,
        "max_steps_per_epoch": None,
        "log_interval": steps + 1,
        "eval_interval": None,
        "eval_batches": 1,
        "drift_interval": None,
        "profile": {"steps": 0, "start": 0},
    }
    values["checkpoint"] |= {
        "storage_path": config.run_dir,
        "interval": None,
        "resume": "never",
        "allow_mismatch": [],
    }
    values["cluster"]["max_failures"] = 0
    values["tracker"]["kind"] = "none"
    values["experiment_name"] = "bench"
    return load(values)


def work(config: Config, start: Start, progress: Any) -> BenchResult:
    """What every rank runs, as worker.run does for training."""
    from tp_trainer.models.model import ParallelModel
    from tp_trainer.recipe import build
    from tp_trainer.session import Rank
    from tp_trainer.tasks.timed import timed_steps

    rank = Rank(config)

    def over(stage: Stage) -> None:
        rank.push(progress, StageDone(stage))

    def built(model: ParallelModel) -> None:
        rank.push(progress, model.built)
        over("model")

    rank.agree(lambda: rank.check(config, start.launch))
    over("workers")
    run = build(config, rank, tokenizer=start.tokenizer, lean=start.lean, built=built)
    over("data")
    with closing(run.model):
        assert start.trace is not None
        return timed_steps(run, start.trace, lambda: over("first_step"))


# --------------------------------------------------------------------------------------------------


def cell(config: Config) -> str:
    """What was timed, in short: tp2_dp2_2048x4 (layout, tokens a row x rows a micro-batch); _acc2:
    two micro-batches a step.
    """
    train, parallelism = config.train, config.parallelism
    parts = config.global_batch_size // (train.micro_batch_size * parallelism.dp)
    return f"{parallelism.layout}_{config.data.seq_length}x{train.micro_batch_size}" + (
        f"_acc{parts}" if parts > 1 else ""
    )


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, extremes and quartiles."""
    quartiles = (
        statistics.quantiles(seconds, n=4, method="inclusive")
        if len(seconds) > 1
        else [seconds[0]] * 3
    )
    return {
        "median": quartiles[1],
        "min": min(seconds),
        "q1": quartiles[0],
        "q3": quartiles[2],
        "max": max(seconds),
    }


def command(argv: Sequence[str]) -> str:
    """The command line, without the place of the program."""
    program = Path(argv[0]).name
    return shlex.join([*(["python"] if program.endswith(".py") else []), program, *argv[1:]])


def commit(directory: Path) -> str | None:
    """The commit of the code in a directory, with -dirty where it was changed since; None where it
    is not under git.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments],
                cwd=directory,
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "."):  # an environment inside somebody's checkout is none of it
        return None
    return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def writable(path: str) -> str:
    """The file to append to, absolute. Raises ConfigError where that can't be done."""
    where = path if "://" in path else str(Path(path).expanduser().resolve())
    try:
        if "://" in where:
            Store(where.rpartition("/")[0])
        else:
            there = Path(where).exists()
            Path(where).parent.mkdir(parents=True, exist_ok=True)
            with open(where, "a", encoding="utf-8"):
                pass
            if not there:
                Path(where).unlink()
    except Exception as error:  # every file system has its own
        raise ConfigError(
            "bench.output",
            path,
            f"can't be appended to ({error}); give a file, e.g. bench.output=bench.jsonl",
        ) from error
    return where


def append(output: str, row: BenchLine) -> None:
    """One line more; an object store takes the file as a whole."""
    line = json.dumps(row) + "\n"
    if "://" not in output:
        with open(output, "a", encoding="utf-8") as file:
            file.write(line)
        return
    directory, _, name = output.rpartition("/")
    store = Store(directory)
    store.write_text(name, (store.read(name).decode() if store.exists(name) else "") + line)


def lines(row: BenchLine) -> str:
    """The figures as a small table."""
    step, parts, took = row["step_seconds"], row["split"], row["startup_seconds"]
    shown = {
        "cell": f"{row['cell']}, {row['model']} on {row['environment']['device']}",
        "step": (
            f"{step['median']:.4g} s, median of {row['timed_steps']} ({step['min']:.4g} to"
            f" {step['max']:.4g}, quartiles {step['q1']:.4g} and {step['q3']:.4g})"
        ),
        "tokens/s": (
            f"{row['tokens_per_second_per_gpu']:,.0f} per worker, {row['tokens_per_second']:,.0f}"
            " in all"
        ),
        "MFU": (
            f"{row['mfu']:.1%} ({row['mfu_causal']:.1%} with attention counted causally)"
            if row["mfu"]
            else None
        ),
        "peak memory": f"{row['peak_gib']:.1f} GiB",
        "a step is": shares(parts) if parts else None,
        "start-up": (
            f"{sum(took.values()):.1f} s: "
            + ", ".join(f"{stage.replace('_', ' ')} {took[stage]:.1f}" for stage in took)
        ),
        "trace": row["trace"],
    }
    return "\n".join(
        ["done", *(f"  {name:<12}{value}" for name, value in shown.items() if value is not None)]
    )


def shares(parts: Mapping[str, float | None]) -> str:
    """What a step went into, of what `trace.split` gives."""
    whole = parts["step"]
    assert whole is not None
    named = (
        f"{part.replace('_', ' ')} {seconds / whole:.1%}"
        for part, seconds in parts.items()
        if part not in ("steps", "step") and seconds is not None
    )
    return f"{', '.join(named)} of {whole:.4g} s under the profiler"


# whether this process has begun a bench: a later one of a sweep didn't start with it
_began_before: list[bool] = []


def _process_began() -> float:
    """Wall clock: when this process began, or now for a later job of a sweep (and where no /proc
    says).
    """
    now = time.time()
    if not _began_before and (stat := Path("/proc/self/stat")).exists():
        ticks = int(stat.read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        now -= max(
            0.0,
            float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
            - ticks / os.sysconf("SC_CLK_TCK"),
        )
    _began_before.append(True)
    return now
