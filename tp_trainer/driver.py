"""Config -> Ray Train's TorchTrainer: capacity, start, live view, summary; `run_jobs` for tasks. It knows Ray, but no torch."""

from __future__ import annotations

import datetime
import importlib
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tp_trainer
from tp_trainer.checkpoint.store import Found, Store, at, launch_file
from tp_trainer.config import (
    RUN_LENGTH,
    SWEEP_WORKERS,
    Cluster,
    Config,
    ConfigError,
    Unrecoverable,
    architecture,
    check_global_batch,
    check_same_run,
    plain,
    to_yaml,
)
from tp_trainer.data.sources import absolute, check_source
from tp_trainer.data.tokens import choose_tokenizer
from tp_trainer.tracker import check_tracker
from tp_trainer.view import View, summary_lines

POLL_SECONDS = 0.2
ANSWER_SECONDS = 5  # until a cluster's address counts as dead
LOST = re.compile("gloo|nccl|connection (closed|reset)", re.IGNORECASE)  # what a rank says whose peer is gone


class RunFailed(RuntimeError):
    """The run began and didn't end well. One line."""


def train(config: Config) -> dict[str, Any]:
    """Run the training that `config` describes to its end. Returns the contents of summary.json.

    Raises:
        ConfigError: refused before the first step.
        RunFailed: the workers failed more often than `cluster.max_failures`.
        KeyboardInterrupt, SystemExit(143): stopped by Ctrl-C or SIGTERM.
    """
    began = time.time()
    config, tokenizer, notice, store = prepare(config)
    view = View()
    if (finished := _finished(config, store)) is not None:
        print(f"{config.experiment_name}: this run has finished; nothing to do (train longer with train.max_steps or train.num_epochs)")
        print(summary_lines(finished), flush=True)
        return finished
    if notice:
        view.update({"event": notice})

    def before() -> None:
        view.update({"event": f"starting {config.parallelism.world_size} {config.cluster.device} workers"})
        if config.checkpoint.resume == "never":
            _set_aside(config, store, view)

    with started(config, store, before) as launch:
        store.write_text("config.yaml", to_yaml(config))
        try:
            summary = _fit(config, tokenizer, launch, began, store, view)
        finally:
            view.close()
    print(summary_lines(summary), flush=True)
    return summary


# --------------------------------------------------------------------------------------------------- before Ray starts


def prepare(config: Config) -> tuple[Config, str, str | None, Store]:
    """Everything that can be checked and settled without a cluster, in this order; `config` is completed in place.

    Returns the config, the tokenizer, a sentence for the user about it or None, and the store of the run's directory.
    """
    absolute(config.data)
    check_source(config.data)
    check_tracker(config)
    tokenizer, notice = choose_tokenizer(config.data, config.model, architecture(config).vocab_size)
    config.data.tokenizer = None if tokenizer == "none" else tokenizer
    _check_device(config)
    store = _open_store(config)
    _settle_global_batch(config, store)
    _check_writable(config, store)
    return config, tokenizer, notice, store


def _check_device(config: Config) -> None:
    """On this machine: GPUs enough for the mesh, or none and memory enough for CPU. `cluster.device` becomes what is used."""
    if config.cluster.kind != "local" or _inside_ray_job():
        return  # known once connected
    world, gpus, asked = config.parallelism.world_size, gpus_here(), config.cluster.device
    if asked == "gpu" and not gpus:
        raise ConfigError("cluster.device", "gpu", "this machine has no GPU; give cluster.device=cpu, or cluster=ray")
    if asked != "cpu" and 0 < gpus < world:
        raise ConfigError("parallelism", config.parallelism.layout,
                          f"needs {world} GPUs, this machine has {gpus}; give a layout with tp x dp <= {gpus}, or cluster.device=cpu")
    config.cluster.device = "gpu" if gpus and asked != "cpu" else "cpu"
    if config.cluster.device == "cpu":
        needed, free = 16 * architecture(config).num_parameters, _free_memory()
        if free is not None and needed > free:
            raise ConfigError("model.name", config.model.name,
                              f"training on CPU needs about {needed / 2**30:.0f} GiB (16 bytes a parameter), "
                              f"{free / 2**30:.0f} GiB are free; give a smaller model, or a machine with GPUs")


def gpus_here() -> int:
    """The NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([each for each in visible.split(",") if each.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines()) if listing.returncode == 0 else 0


def _free_memory() -> int | None:
    """Bytes that could still be allocated here, swap left out; None where the system doesn't say."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _open_store(config: Config) -> Store:
    try:
        return Store(config.run_dir)
    except ImportError as error:  # fsspec names the package for this kind of URL
        raise ConfigError("checkpoint.storage_path", config.checkpoint.storage_path, f"needs a package: {error}") from error
    except ValueError as error:
        raise ConfigError("checkpoint.storage_path", config.checkpoint.storage_path, f"no such kind of storage ({error})") from error


def _check_writable(config: Config, store: Store) -> None:
    """Makes the run's directory, and a file in it for a moment."""
    probe = f".writable-{uuid.uuid4().hex[:8]}"
    try:
        store.write_text(probe, "")
        store.remove(probe)
    except Exception as error:  # every file system has its own
        raise ConfigError("checkpoint.storage_path", config.checkpoint.storage_path, f"not writable ({error})") from error


def _settle_global_batch(config: Config, store: Store) -> None:
    """The global batch is fixed at a run's first start: a resume takes it from the checkpoint, in whatever layout."""
    parallelism, train = config.parallelism, config.train
    found: Found | str | None = None
    if config.checkpoint.resume == "auto":
        found = store.newest()[0]
        stored = store.read_yaml("config.yaml") if found else None
        if stored:
            check_same_run(config, stored)
    elif config.checkpoint.resume != "never":
        found = at(config.checkpoint.resume)
        if isinstance(found, str):
            raise ConfigError("checkpoint.resume", config.checkpoint.resume, f"{found}; give auto, never or a checkpoint's directory")
        newest = store.newest()[0]
        if newest is not None and newest.step > found.step:
            raise ConfigError("checkpoint.resume", config.checkpoint.resume,
                              f"{config.experiment_name} has gone on to step {newest.step}; give another experiment_name to branch off")
    if isinstance(found, Found):
        size = int(found.state["global_batch_size"])
        if train.global_batch_size not in (None, size):
            raise ConfigError("train.global_batch_size", train.global_batch_size,
                              f"this run was started with {size}; leave it out, or give another experiment_name")
        train.global_batch_size = size
    elif train.global_batch_size is None:
        train.global_batch_size = train.micro_batch_size * parallelism.dp
    check_global_batch(train.global_batch_size, train.micro_batch_size, parallelism.dp)


def _finished(config: Config, store: Store) -> dict[str, Any] | None:
    """The summary of this run where it has finished and no more is asked than was asked then."""
    summary = store.read_json("summary.json") if config.checkpoint.resume == "auto" else None
    asked = {name: getattr(config.train, name) for name in RUN_LENGTH}
    if summary and summary.get("status") == "finished" and summary.get("run_length") == asked:
        return dict(summary)
    return None


def _set_aside(config: Config, store: Store, view: View) -> None:
    """checkpoint.resume=never with a run of that name: what it wrote is kept under another name."""
    if not store.step_names():
        return
    if "://" in store.run_dir:
        raise ConfigError("checkpoint.resume", "never", f"{store.run_dir} holds checkpoints; give another experiment_name")
    kept = f"{store.run_dir}.before-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    os.rename(store.run_dir, kept)
    view.update({"event": f"checkpoint.resume=never: the run that was there is kept as {kept}"})


# ---------------------------------------------------------------------------------------------------------------- Ray


@contextmanager
def started(config: Config, store: Store, before: Callable[[], None] = lambda: None) -> Iterator[str]:
    """A Ray with room for the workers. Gives the name of this start, by which they know that they see the same storage.

    Args:
        before: called once the cluster can take the run, before anything is written.
    """
    launch = uuid.uuid4().hex[:12]
    workers = max(config.parallelism.world_size, int(os.environ.get(SWEEP_WORKERS, 0)))  # one Ray for all jobs of a sweep
    with _sigterm_exits(), _ray(config.cluster, workers * config.cluster.cpus_per_worker):
        _check_capacity(config)
        before()
        store.remove_all(launch_file("*"))  # what killed drivers left
        store.write_text(launch_file(launch), "")
        try:
            yield launch
        finally:
            store.remove(launch_file(launch))


def _inside_ray_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextmanager
def _ray(cluster: Cluster, needed: float) -> Iterator[None]:
    """A Ray to run on: this machine's own (kept for the next job of a sweep), a running cluster, or this Ray job's.

    Args:
        needed: CPUs that this machine's own must have.
    """
    # Train's controller polls workers this often, and every report waits for a poll
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # silences a warning about what we don't rely on
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    if ray.is_initialized() and _owns_ray and ray.cluster_resources().get("CPU", 0) < needed:
        ray.shutdown()  # a job after a smaller one, that no sweep foresaw
    if not ray.is_initialized():
        if cluster.kind == "local" and not _inside_ray_job():
            cores = max(os.cpu_count() or 1, math.ceil(needed))
            ray.init(address="local", num_cpus=cores, include_dashboard=False, **options)
            _owns_ray.append(True)
        else:
            _check_answers(cluster.address)
            package = str(Path(tp_trainer.__file__).parent)
            runtime = {} if _inside_ray_job() else {"runtime_env": {"py_modules": [package]}}
            try:
                ray.init(address=cluster.address or "auto", **runtime, **options)
            except ConnectionError as error:
                reason = f"no Ray cluster answers there ({str(error).splitlines()[0]})"
                if "AuthenticationError" in str(error.__cause__):
                    reason = "wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN unless it lies in ~/.ray/auth_token"
                raise ConfigError("cluster.address", cluster.address or "auto", reason) from error
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        ray.shutdown()  # takes the workers with it
        raise


def _check_answers(address: str | None) -> None:
    """Refuse an address where nothing listens: Ray itself would try for minutes."""
    if address is None:
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        if parts.hostname is None or parts.port is None:  # auto, or a scheme with ways of its own
            return
        with socket.create_connection((parts.hostname, parts.port), timeout=ANSWER_SECONDS):
            pass
    except (OSError, ValueError) as error:
        raise ConfigError("cluster.address", address, f"no Ray cluster answers there ({error}); <host>:<port> is wanted") from error


_owns_ray: list[bool] = []  # whether this process started the Ray that it uses


def _check_capacity(config: Config) -> None:
    """Refuse what Ray would wait for without end: more workers than the cluster has CPUs or GPUs.

    Nodes of a cluster that is still growing are waited for, `cluster.wait_seconds` at most.
    """
    import ray

    cluster, world, layout = config.cluster, config.parallelism.world_size, config.parallelism.layout
    deadline = time.monotonic() + cluster.wait_seconds
    while True:
        have = ray.cluster_resources()
        gpus, cpus = int(have.get("GPU", 0)), have.get("CPU", 0)
        enough_gpus = gpus >= world or cluster.device == "cpu" or (cluster.device == "auto" and gpus == 0)
        if (enough_gpus and cpus >= world * cluster.cpus_per_worker) or time.monotonic() > deadline:
            break
        time.sleep(1)
    if cluster.device == "gpu" and gpus == 0:
        raise ConfigError("cluster.device", "gpu", "the cluster has no GPU; give cluster.device=cpu")
    if not enough_gpus:
        raise ConfigError("parallelism", layout, f"needs {world} GPUs, the cluster has {gpus}")
    cluster.device = "gpu" if gpus and cluster.device != "cpu" else "cpu"
    if cpus < world * cluster.cpus_per_worker:
        raise ConfigError("parallelism", layout,
                          f"needs {world} workers with {cluster.cpus_per_worker:g} CPUs each, the cluster has {cpus:g} CPUs")


def run_jobs(cluster: Cluster, function: Callable[[Any], Any], jobs: Sequence[Any], memory: Sequence[int]) -> list[Any]:
    """`function(job)` for every job, each in a Ray task of its own with one CPU. Returns their results in order.

    Args:
        function: of a module's top level.
        memory: bytes that each job holds; Ray puts as many onto a node at a time as fit.

    Raises:
        ConfigError: what a job raised.
        RunFailed: a job failed in another way.
    """
    with _sigterm_exits(), _ray(cluster, 1):
        import ray

        # more than the largest node has would be waited for without end
        most = max(int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"])
        task = ray.remote(num_cpus=1)(_job)
        environment = _environment(cluster)
        pending = [task.options(memory=min(size, most)).remote(environment, function, job)
                   for job, size in zip(jobs, memory, strict=True)]  # fmt: skip
        try:
            answers = ray.get(pending)
        except ray.exceptions.RayError as error:
            # the others first, so that none goes on behind the caller's back; cancelling one that is just done crashes Ray 2.60
            ray.wait(pending, num_returns=len(pending))
            cause = getattr(error, "cause", None) or error
            raise RunFailed(textwrap.shorten(f"{type(cause).__name__}: {cause}", 400)) from error
        for refused, _ in answers:
            if refused:
                raise ConfigError(*refused)
        return [result for _, result in answers]


def _job(environment: dict[str, str], function: Callable[[Any], Any], job: Any) -> tuple[tuple[str, object, str] | None, Any]:
    """What a Ray task runs: a refusal (it goes as a value, as from `_worker`) or None, and the result."""
    os.environ.update(environment)
    try:
        return None, function(job)
    except ConfigError as error:
        return (error.key, error.value, error.message), None


def _environment(cluster: Cluster) -> dict[str, str]:
    """What of the environment travels to the workers."""
    return {key: os.environ[key] for key in ("HF_TOKEN", "HF_HUB_OFFLINE") if key in os.environ} | cluster.env


class Progress:
    """The actor between rank 0, which pushes without waiting, and the driver, which polls."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []

    def push(self, item: dict[str, Any]) -> None:
        self.items.append(item)

    def drain(self) -> list[dict[str, Any]]:
        items, self.items = self.items, []
        return items


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on each worker: the recipe that `settings` name.

    Refusals and drifts, the same on every rank, are returned: a raised error would be tried again. Of an error Ray Train
    sends no trace along: it goes as a note.
    """
    os.environ.update(settings["environment"])  # before torch is imported

    module, _, name = settings["recipe"].partition(":")
    try:
        return getattr(importlib.import_module(module), name)(settings)
    except ConfigError as error:
        return {"refused": (error.key, error.value, error.message)}
    except Unrecoverable as error:
        return {"drifted": str(error)}
    except Exception as error:
        error.add_note(traceback.format_exc())
        raise


def fit(
    config: Config, recipe: str, settings: dict[str, Any], store: Store, take: Callable[[dict[str, Any]], None]
) -> tuple[Exception | None, dict[str, Any] | None]:
    """Run a recipe on every worker and wait for its end.

    Args:
        recipe: `module:function`, imported on the worker; it is given `settings`, `config` (plain) and `progress`.
        store: of the run's directory.
        take: is given what rank 0 pushes to `progress`.

    Returns:
        the error that the workers failed with, or rank 0's return value.

    Raises:
        ConfigError: a worker refused.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpu, cluster = config.cluster.device == "gpu", config.cluster
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    progress = ray.remote(num_cpus=0)(Progress).options(scheduling_strategy=here).remote()
    environment = _environment(cluster)
    values = plain(config)
    values["cluster"]["env"] = {}  # its values travel apart, to no log
    # Ray would take up what it remembers of this name; the storage itself says what there is
    store.remove("checkpoint_manager_snapshot.json")
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            **settings, "recipe": recipe, "config": values, "environment": environment, "progress": progress,
        },
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.parallelism.world_size, use_gpu=gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
            accelerator_type=cluster.accelerator_type, placement_strategy="PACK",
        ),
        run_config=RunConfig(
            name=config.experiment_name, storage_path=config.checkpoint.storage_path,
            failure_config=FailureConfig(max_failures=cluster.max_failures), checkpoint_config=CheckpointConfig(num_to_keep=None),
        ),
    )  # fmt: skip
    error, result = _wait(trainer, progress, take)
    if result is not None and "refused" in result:
        raise ConfigError(*result["refused"])
    return error, result


def _fit(config: Config, tokenizer: str, launch: str, began: float, store: Store, view: View) -> dict[str, Any]:
    """Train on the workers, show what they say, wait for their end, write summary.json."""
    followed, cluster = _Followed(config, view), config.cluster
    error, result = fit(config, "tp_trainer.worker:run", {"launch": launch, "tokenizer": tokenizer}, store, followed.take)
    drifted = (result or {}).get("drifted")
    summary: dict[str, Any] = {
        "status": "failed" if error or drifted else "finished", "steps": followed.step, "tokens": followed.row.get("tokens", 0),
        "loss": followed.row.get("loss"), "validation_loss": followed.validation_loss, "unigram_loss": None,
        "wall_seconds": time.time() - began, "startup_seconds": (followed.begun or time.time()) - began, "tokens_per_second": None,
        "restarts": max(0, followed.starts - 1), "resumed_from": None, "skipped_checkpoints": [], "checkpoint": None, "skipped_steps": 0,
        "world": config.parallelism.world_size, "mesh": {"dp": config.parallelism.dp, "tp": config.parallelism.tp},
    }  # fmt: skip
    if config.parallelism.dp_replicate > 1:
        summary["mesh"]["dp_replicate"] = config.parallelism.dp_replicate
    if result is not None and not drifted:
        summary |= result
    summary |= {
        "run_dir": config.run_dir, "device": cluster.device, "random_data": config.data.source == "random", "tracker": config.tracker.kind,
        "run_length": {name: getattr(config.train, name) for name in RUN_LENGTH},
    }  # fmt: skip
    store.write_json("summary.json", summary)
    if error is not None:
        raise RunFailed(failure(error, store))
    if drifted:
        raise RunFailed(drifted)
    return summary


class _Followed:
    """What the driver has seen of the run."""

    def __init__(self, config: Config, view: View) -> None:
        self.config, self.view = config, view
        self.starts, self.step = 0, 0
        self.row: dict[str, Any] = {}
        self.validation_loss: float | None = None
        self.begun: float | None = None

    def take(self, item: dict[str, Any]) -> None:
        if "begin" in item:
            self.starts += 1
            self.begun = self.begun or time.time()
            self.view.start(item["begin"], self.config, self.config.parallelism.world_size, item["device"])
            if self.starts > 1:
                self.view.update({"event": f"workers restarted: going on from step {item['step']}"})
            elif item["step"]:
                self.view.update({"event": f"resumed from step {item['step']}"})
            return
        self.step = item.get("step", self.step)
        self.validation_loss = item.get("validation_loss", self.validation_loss)
        if "loss" in item:
            self.row = item
        self.view.update(item)


def _wait(trainer: Any, progress: Any, take: Callable[[dict[str, Any]], None]) -> tuple[Exception | None, dict[str, Any] | None]:
    """`fit()` in a thread, so that the main one draws and hears signals. Returns the error, or rank 0's return value."""
    import ray

    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit().return_value
        except BaseException as error:
            outcome["error"] = error

    def drain() -> None:
        try:
            for item in ray.get(progress.drain.remote(), timeout=10):
                take(item)
        except ray.exceptions.RayError:
            pass  # the view may lag; fit() says how the run ends

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    with _sigterm_exits():
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            drain()
    drain()
    return outcome.get("error"), outcome.get("result")


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM raises SystemExit(143) in the main thread (signals can be caught nowhere else).

    While Ray starts it has a handler of its own, which exits with 15 or 1.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: object) -> None:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except SystemExit as end:
        if end.code == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def failure(error: Exception, store: Store) -> str:
    """One line about why the workers failed; the traces go to failure.txt in the run's directory."""
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", None) or {}
    traces = {rank: "\n".join(getattr(each, "__notes__", [])) or f"{type(each).__name__}: {each}" for rank, each in failures.items()}
    store.write_text("failure.txt", "\n\n".join(f"rank {rank}:\n{traces[rank]}" for rank in sorted(traces)) + f"\n\n{error}\n")
    # when one rank fails, others lose their connection to it: they are not the cause
    order = sorted(failures, key=lambda rank: (bool(LOST.search(str(failures[rank]))), rank))
    rank, first = (order[0], failures[order[0]]) if order else (None, error)
    cause = getattr(first, "health_check_failure", None) or first  # of a worker that is gone, Ray Train wraps Ray's own words
    line = textwrap.shorten(f"{type(cause).__name__}: {cause}", 400)
    return f"{f'rank {rank}: ' if rank is not None else ''}{line} (all of it in {store.run_dir}/failure.txt)"


__all__ = ["RunFailed", "failure", "fit", "gpus_here", "prepare", "run_jobs", "started", "train"]
