"""Connecting to Ray, checking that it has room for the workers, and running plain jobs on it."""

from __future__ import annotations

import gc
import importlib
import logging
import math
import os
import socket
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tp_trainer
from tp_trainer.checkpoint.owner import Owner
from tp_trainer.checkpoint.store import Store, launch_file
from tp_trainer.config import DIRECTORY, SWEEP_WORKERS, Cluster, Config, ConfigError
from tp_trainer.driver.errors import RunFailed
from tp_trainer.driver.path import job_config
from tp_trainer.driver.signals import Signals, notices_blocked

ANSWER_SECONDS = 5  # until a cluster's address counts as dead


@contextmanager
def started(
    config: Config,
    store: Store,
    before: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = print,
    ended: Callable[[BaseException | None], None] = lambda error: None,
) -> Iterator[Owner]:
    """Claim the run's directory, and connect to a Ray with room for the workers.

    Gives the owner. Its `launch` is the name of this start, by which the workers know that they see
    the same storage.

    Args:
        before: called once the cluster can take the run, before anything is written.
        say: takes a sentence for the user.
        ended: called last, while the directory is still this process's; with what was raised, or
            None.

    Raises:
        ConfigError: another process trains there, or the cluster has no room.
    """
    owner = Owner(store, uuid.uuid4().hex[:12])
    # one Ray for all jobs of a sweep
    workers = max(config.parallelism.world_size, int(os.environ.get(SWEEP_WORKERS, 0)))
    with Signals().heard(), ExitStack() as stack:
        owner.claim("experiment_name", config.experiment_name)
        stack.callback(owner.release)
        stack.push(lambda kind, error, trace: ended(error))
        if owner.taken_over:
            say(owner.taken_over)
        cpus = workers * config.cluster.cpus_per_worker
        check = partial(_check_model, config, say)
        stack.enter_context(connected(config.cluster, cpus, check))
        check_capacity(config)
        before()
        store.remove_all(launch_file("*"))  # what killed drivers left
        store.write_text(launch_file(owner.launch), "")
        stack.callback(store.remove, launch_file(owner.launch))
        yield owner


def _check_model(config: Config, say: Callable[[str], None]) -> None:
    from tp_trainer.models.description import check_model

    if (notice := check_model(config)) is not None:
        say(notice)


def owns_ray() -> bool:
    """Whether this process started the Ray that it uses."""
    return bool(_owns_ray)


def inside_ray_job() -> bool:
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


@contextmanager
def connected(
    cluster: Cluster, needed: float, check: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """A Ray to run on: this machine's own (kept for the next job of a sweep), a running cluster, or
    this Ray job's.

    Args:
        needed: CPUs that this machine's own must have.
        check: may refuse the run; done beside the start of Ray's own processes, or once a cluster
            has answered.
    """
    # Train's controller polls workers this often, and every report waits for a poll; ten times a
    # second, a model that fits on a laptop takes 6 % longer to train
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    # silences a warning about what we don't rely on
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if cluster.kind == "local" and not inside_ray_job():
        # nobody drains this machine: a process less per start
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # a process for each core, and Train takes none of them
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        # under `uv run` it would pack the working directory: workers have this environment anyway
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    if ray.is_initialized() and owns_ray() and ray.cluster_resources().get("CPU", 0) < needed:
        ray.shutdown()  # a job after a smaller one, that no sweep foresaw
        _owns_ray.clear()
    if not ray.is_initialized():
        if cluster.kind == "local" and not inside_ray_job():
            cores = max(os.cpu_count() or 1, math.ceil(needed))
            # it takes torch and transformers; Ray's own processes start in that time
            with _meanwhile(check), notices_blocked():
                ray.init(
                    address="local",
                    num_cpus=cores,
                    include_dashboard=False,
                    job_config=job_config(own=True),
                    **options,
                )
                _owns_ray.append(True)
        else:
            _join(cluster.address, options)
            check()  # last: it takes seconds, and whether a cluster answers none
    else:
        check()
    try:
        with Signals().heard():
            yield
    except (KeyboardInterrupt, SystemExit):
        ray.shutdown()  # takes the workers with it
        raise


def _join(address: str | None, options: dict[str, Any]) -> None:
    """Connect to a running cluster, or the one of this Ray job. Raises ConfigError."""
    import ray

    _check_answers(address)
    if not inside_ray_job():
        options["runtime_env"] = {"py_modules": [str(Path(tp_trainer.__file__).parent)]}
    if "://" not in (address or ""):  # Ray's client puts nothing of this machine on the path
        options["job_config"] = job_config(own=False)
    try:
        ray.init(address=address or "auto", **options)
    except ConnectionError as error:
        reason = f"no Ray cluster answers there ({str(error).splitlines()[0]})"
        if "AuthenticationError" in str(error.__cause__):
            reason = (
                "wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN unless it lies"
                " in ~/.ray/auth_token"
            )
        raise ConfigError("cluster.address", address or "auto", reason) from error
    except RuntimeError as error:
        if "is not in the working_dir" not in str(error):
            raise
        reason = (
            "under `uv run` Ray sends the working directory to the cluster, and pyproject.toml lies"
            " above it; go to that directory, or set RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 where the"
            " nodes have an environment of their own"
        )
        raise ConfigError("cluster.address", address or "auto", reason) from error


@contextmanager
def _meanwhile(check: Callable[[], None]) -> Iterator[None]:
    """A check runs beside, and what Ray Train imports later is imported; what the check refuses is
    raised at the end.
    """
    refused: list[Exception] = []

    def work() -> None:
        try:
            check()
            importlib.import_module("ray.train.torch")
        except Exception as error:
            refused.append(error)

    thread = threading.Thread(target=work)
    with no_collections():
        thread.start()
        try:
            yield
        finally:
            thread.join()
    if refused:
        raise refused[0]


@contextmanager
def no_collections() -> Iterator[None]:
    """Switch the garbage collector off: it takes a seventh of the time of large imports. What is
    there in the end it never looks at again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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
        raise ConfigError(
            "cluster.address",
            address,
            f"no Ray cluster answers there ({error}); <host>:<port> is wanted",
        ) from error


_owns_ray: list[bool] = []  # whether this process started the Ray that it uses


def check_capacity(config: Config) -> None:
    """Refuse what Ray would wait for without end: more workers than the cluster has CPUs or GPUs.

    Nodes of a cluster that is still growing are waited for, `cluster.wait_seconds` at most.
    """
    import ray

    cluster, world, layout = (
        config.cluster,
        config.parallelism.world_size,
        config.parallelism.layout,
    )
    deadline = time.monotonic() + cluster.wait_seconds
    while True:
        have = ray.cluster_resources()
        gpus, cpus = int(have.get("GPU", 0)), have.get("CPU", 0)
        enough_gpus = (
            gpus >= world or cluster.device == "cpu" or (cluster.device == "auto" and gpus == 0)
        )
        if (enough_gpus and cpus >= world * cluster.cpus_per_worker) or time.monotonic() > deadline:
            break
        time.sleep(1)
    if cluster.device == "gpu" and gpus == 0:
        raise ConfigError(
            "cluster.device", "gpu", "the cluster has no GPU; give cluster.device=cpu"
        )
    if not enough_gpus:
        raise ConfigError("parallelism", layout, f"needs {world} GPUs, the cluster has {gpus}")
    cluster.device = "gpu" if gpus and cluster.device != "cpu" else "cpu"
    if cpus < world * cluster.cpus_per_worker:
        raise ConfigError(
            "parallelism",
            layout,
            f"needs {world} workers with {cluster.cpus_per_worker:g} CPUs each, the cluster has"
            f" {cpus:g} CPUs",
        )


def run_jobs(
    cluster: Cluster, function: Callable[[Any], Any], jobs: Sequence[Any], memory: Sequence[int]
) -> list[Any]:
    """`function(job)` for every job, each in a Ray task of its own with one CPU. Returns their
    results in order.

    Args:
        function: of a module's top level.
        memory: bytes that each job holds; Ray puts as many onto a node at a time as fit.

    Raises:
        ConfigError: what a job raised.
        RunFailed: a job failed in another way.
    """
    with Signals().heard(), connected(cluster, 1):
        import ray

        # more than the largest node has would be waited for without end
        most = max(int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"])
        task = ray.remote(num_cpus=1)(_job)
        environment = environment_of(cluster)
        pending = [
            task.options(memory=min(size, most)).remote(environment, function, job)
            for job, size in zip(jobs, memory, strict=True)
        ]
        try:
            answers = ray.get(pending)
        except ray.exceptions.RayError as error:
            # the others first, so that none goes on behind the caller's back; cancelling one that
            # is just done crashes Ray 2.60
            ray.wait(pending, num_returns=len(pending))
            cause = getattr(error, "cause", None) or error
            raise RunFailed(textwrap.shorten(f"{type(cause).__name__}: {cause}", 400)) from error
        for refused, _ in answers:
            if refused:
                raise ConfigError(*refused)
        return [result for _, result in answers]


def _job(
    environment: dict[str, str], function: Callable[[Any], Any], job: Any
) -> tuple[tuple[str, object, str] | None, Any]:
    """What a Ray task runs: a refusal (it goes as a value, as from `_worker`) or None, and the
    result.
    """
    os.environ.update(environment)
    try:
        return None, function(job)
    except ConfigError as error:
        return (error.key, error.value, error.message), None


def environment_of(cluster: Cluster) -> dict[str, str]:
    """What of the environment travels to the workers, and where the command was given."""
    of_the_hub = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT")
    sent = {key: os.environ[key] for key in of_the_hub if key in os.environ}
    return sent | {DIRECTORY: os.getcwd()} | cluster.env
