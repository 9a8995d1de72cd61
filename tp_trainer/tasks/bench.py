"""task=bench: how fast the training loop is in the chosen layout, and where its time goes.

The loop is the real one, on the workers through Ray, with random weights and nothing saved, tracked or evaluated. A line of
JSON with every figure, the command, the commit and the environment is appended to `bench.output`.
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
from typing import Any

from tp_trainer.checkpoint.store import Store
from tp_trainer.config import Config, ConfigError, architecture, load, plain
from tp_trainer.config.identity import model_name
from tp_trainer.driver import RunFailed, failure, fit, prepare, started

LR = 1e-7  # nothing is to be learned, and nothing to diverge
STAGES = ("compose", "ray", "workers", "model", "data", "first_step")  # of the start-up, in their order


def run(config: Config) -> dict[str, Any]:
    """Time the steps, append a line to `bench.output` and print the figures. Returns what the line holds.

    Raises:
        ConfigError: refused before anything starts.
        RunFailed: a worker failed.
    """
    moments = [_process_began(), time.time()]
    output = writable(config.bench.output or f"{config.checkpoint.storage_path.rstrip('/')}/bench.jsonl")
    config, tokenizer, notice, store = prepare(benched(config))
    numbers, bench, now = architecture(config), config.bench, datetime.datetime.now().astimezone()
    print(f"bench: {numbers.model_type}, {numbers.num_hidden_layers} layers of width {numbers.hidden_size}, {config.parallelism.layout}; "
          f"{bench.warmup} + {bench.steps} steps of {config.train.global_batch_size} x {config.data.seq_length} tokens")  # fmt: skip
    print(f"  weights: random{f'; {notice}' if notice else ''}", flush=True)

    def take(item: dict[str, Any]) -> None:  # a stage of the start-up is over
        moments.append(time.time() - item["age"])

    with started(config, store) as owner:
        moments.append(time.time())
        settings = {"launch": owner.launch, "tokenizer": tokenizer, "trace": f"profile/{now:%Y%m%d-%H%M%S}-{owner.launch}.json.gz"}
        error, result = fit(config, "tp_trainer.tasks.bench:work", settings, store, take)
    if error is not None:
        raise RunFailed(failure(error, store))
    assert result is not None
    if "unrecoverable" in result:
        raise RunFailed(result["unrecoverable"])
    seconds = result.pop("seconds")
    row = {
        "date": now.isoformat(timespec="seconds"), "cell": cell(config), "program": "ours", "model": model_name(config),
        "layers": numbers.num_hidden_layers, **result, "step_seconds": spread(seconds), "timed_steps": len(seconds),
        "startup_seconds": dict(zip(STAGES, (after - before for before, after in pairwise(moments)), strict=False)),
        "command": command(sys.argv), "commit": commit(Path(__file__).parent),
    }  # fmt: skip
    append(output, row)
    print(lines(row), f"  {'line':<12}{output}", sep="\n", flush=True)
    return row


def benched(config: Config) -> Config:
    """The config of the timed run. Its files go to <run>/bench, so that a training run of the name stays as it is."""
    values, steps = plain(config), config.bench.all_steps
    values["model"] |= {"weights": "random", "overrides": {}}
    values["optim"] |= {"lr": LR, "schedule": "constant", "warmup_steps": 0, "decay_steps": None}
    values["train"] |= {
        "max_steps": steps + 1, "max_steps_per_epoch": None, "log_interval": steps + 1, "eval_interval": None, "eval_batches": 1,
        "drift_interval": None, "profile": {"steps": 0, "start": 0},
    }  # fmt: skip
    values["checkpoint"] |= {"storage_path": config.run_dir, "interval": None, "resume": "never", "allow_mismatch": []}
    values["cluster"]["max_failures"] = 0
    values["tracker"]["kind"] = "none"
    values["experiment_name"] = "bench"
    return load(values)


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What every rank runs, as worker.run does for training."""
    import torch

    from tp_trainer.data import open_data
    from tp_trainer.models.build import build_model
    from tp_trainer.optim import build_optimizer
    from tp_trainer.parallel.mesh import build_mesh
    from tp_trainer.session import Node
    from tp_trainer.tasks.timed import timed_steps

    config, tokenizer = load(settings["config"]), settings["tokenizer"]
    node = Node(config)

    def over(stage: str) -> None:
        if node.rank == 0:
            settings["progress"].push.remote({"over": stage})

    node.agree(lambda: node.check(config, settings["launch"]))
    over("workers")
    mesh = build_mesh(config.parallelism, node.device)
    model = node.agree(lambda: build_model(config, mesh, node.first))
    over("model")
    data = node.agree(lambda: open_data(
        config, tokenizer=tokenizer, dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, first_on_node=node.first))  # fmt: skip
    over("data")
    optimizer = build_optimizer(config.optim, model.module.named_parameters())
    torch.manual_seed(config.seed + 1 + (node.rank if config.parallelism.sequence_parallel else mesh.dp_rank))
    with closing(model):
        return timed_steps(config, mesh, model, optimizer, data, settings["trace"], lambda: over("first_step"))


# ------------------------------------------------------------------------------------------------------------ the line


def cell(config: Config) -> str:
    """What was timed, in short: tp2_dp2_2048x4 (layout, tokens a row x rows a micro-batch); _acc2: two micro-batches a step."""
    train, parallelism = config.train, config.parallelism
    parts = (train.global_batch_size or 0) // (train.micro_batch_size * parallelism.dp)
    return f"{parallelism.layout}_{config.data.seq_length}x{train.micro_batch_size}" + (f"_acc{parts}" if parts > 1 else "")


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median, extremes and quartiles."""
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    return {"median": quartiles[1], "min": min(seconds), "q1": quartiles[0], "q3": quartiles[2], "max": max(seconds)}


def command(argv: Sequence[str]) -> str:
    """The command line, without the place of the program."""
    program = Path(argv[0]).name
    return shlex.join([*(["python"] if program.endswith(".py") else []), program, *argv[1:]])


def commit(directory: Path) -> str | None:
    """The commit of the code in a directory, with -dirty where it was changed since; None where it is not under git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=30, check=False)
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
            with open(where, "a"):
                pass
            if not there:
                Path(where).unlink()
    except Exception as error:  # every file system has its own
        raise ConfigError("bench.output", path, f"can't be appended to ({error}); give a file, e.g. bench.output=bench.jsonl") from error
    return where


def append(output: str, row: Mapping[str, Any]) -> None:
    """One line more; an object store takes the file as a whole."""
    line = json.dumps(row) + "\n"
    if "://" not in output:
        with open(output, "a") as file:
            file.write(line)
        return
    directory, _, name = output.rpartition("/")
    store = Store(directory)
    store.write_text(name, (store.read(name).decode() if store.exists(name) else "") + line)


def lines(row: Mapping[str, Any]) -> str:
    """The figures as a small table."""
    step, parts, took = row["step_seconds"], row["split"], row["startup_seconds"]
    shown = {
        "cell": f"{row['cell']}, {row['model']} on {row['environment']['device']}",
        "step": f"{step['median']:.4g} s, median of {row['timed_steps']} "
                f"({step['min']:.4g} to {step['max']:.4g}, quartiles {step['q1']:.4g} and {step['q3']:.4g})",
        "tokens/s": f"{row['tokens_per_second_per_gpu']:,.0f} per worker, {row['tokens_per_second']:,.0f} in all",
        "MFU": f"{row['mfu']:.1%} ({row['mfu_causal']:.1%} with attention counted causally)" if row["mfu"] else None,
        "peak memory": f"{row['peak_gib']:.1f} GiB",
        "a step is": ", ".join(f"{part.replace('_', ' ')} {parts[part] / parts['step']:.1%}" for part in parts
                             if part not in ("steps", "step") and parts[part] is not None)
                     + f" of {parts['step']:.4g} s under the profiler" if parts else None,
        "start-up": f"{sum(took.values()):.1f} s: " + ", ".join(f"{stage.replace('_', ' ')} {took[stage]:.1f}" for stage in took),
        "trace": row["trace"],
    }  # fmt: skip
    return "\n".join(["done", *(f"  {name:<12}{value}" for name, value in shown.items() if value is not None)])


_began_before: list[bool] = []  # whether this process has begun a bench: a later one of a sweep didn't start with it


def _process_began() -> float:
    """Wall clock: when this process began, or now for a later job of a sweep (and where no /proc says)."""
    now = time.time()
    if not _began_before and (stat := Path("/proc/self/stat")).exists():
        ticks = int(stat.read_text().rpartition(")")[2].split()[19])
        now -= max(0.0, float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK"))
    _began_before.append(True)
    return now
