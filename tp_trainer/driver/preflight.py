"""What is checked and settled before Ray starts: device, data, storage, what the run's directory holds."""

from __future__ import annotations

import datetime
import os
import uuid
from typing import Any

from tp_trainer.checkpoint.owner import LOCK, OWNER
from tp_trainer.checkpoint.store import Found, Store, at
from tp_trainer.config import RUN_LENGTH, Config, ConfigError, architecture, check_global_batch, check_same_run
from tp_trainer.data.sources import absolute, check_source
from tp_trainer.data.tokens import choose_tokenizer
from tp_trainer.driver.ray_cluster import inside_ray_job
from tp_trainer.host import free_host_memory, gpus_here
from tp_trainer.tracker import check_tracker
from tp_trainer.view import View


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
    if config.cluster.kind != "local" or inside_ray_job():
        return  # known once connected
    world, gpus, asked = config.parallelism.world_size, gpus_here(), config.cluster.device
    if asked == "gpu" and not gpus:
        raise ConfigError("cluster.device", "gpu", "this machine has no GPU; give cluster.device=cpu, or cluster=ray")
    if asked != "cpu" and 0 < gpus < world:
        raise ConfigError("parallelism", config.parallelism.layout,
                          f"needs {world} GPUs, this machine has {gpus}; give a layout with tp x dp <= {gpus}, or cluster.device=cpu")
    config.cluster.device = "gpu" if gpus and asked != "cpu" else "cpu"
    if config.cluster.device == "cpu":
        needed, free = 16 * architecture(config).num_parameters, free_host_memory()
        if free is not None and needed > free:
            raise ConfigError("model.name", config.model.name,
                              f"training on CPU needs about {needed / 2**30:.0f} GiB (16 bytes a parameter), "
                              f"{free / 2**30:.0f} GiB are free; give a smaller model, or a machine with GPUs")


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
        if found and (stored := store.read_yaml("config.yaml")):
            check_same_run(config, stored, store.run_dir)
    elif config.checkpoint.resume != "never":
        found = at(config.checkpoint.resume)
        if isinstance(found, str):
            raise ConfigError("checkpoint.resume", config.checkpoint.resume, f"{found}; give auto, never or a checkpoint's directory")
        place = found.path.rpartition("/")[0]
        if stored := Store(place).read_yaml("config.yaml"):
            check_same_run(config, stored, place)
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


def finished(config: Config, store: Store) -> dict[str, Any] | None:
    """The summary of this run where it has finished and no more is asked than was asked then."""
    summary = store.read_json("summary.json") if config.checkpoint.resume == "auto" else None
    asked = {name: getattr(config.train, name) for name in RUN_LENGTH}
    if summary and summary.get("status") == "finished" and summary.get("run_length") == asked:
        return dict(summary)
    return None


def set_aside(config: Config, store: Store, view: View) -> None:
    """checkpoint.resume=never with a run of that name: what it wrote is kept under another name."""
    if not store.step_names():
        return
    if "://" in store.run_dir:
        raise ConfigError("checkpoint.resume", "never", f"{store.run_dir} holds checkpoints; give another experiment_name")
    kept = f"{store.run_dir}.before-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    os.makedirs(kept)
    for name in os.listdir(store.run_dir):
        if name not in (OWNER, LOCK):  # they are this process's
            os.rename(f"{store.run_dir}/{name}", f"{kept}/{name}")
    view.update({"event": f"checkpoint.resume=never: the run that was there is kept as {kept}"})
