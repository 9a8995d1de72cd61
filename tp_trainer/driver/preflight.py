"""What is checked and settled before Ray starts: device, data, storage, what the run's directory
holds.
"""

from __future__ import annotations

import datetime
import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, cast

from tp_trainer.checkpoint.owner import LOCK, OWNER
from tp_trainer.checkpoint.store import (
    UNFINISHED,
    Store,
    VerifiedCheckpoint,
    check_some_count,
    named,
)
from tp_trainer.config import (
    RUN_LENGTH,
    Config,
    ConfigError,
    architecture,
    check_global_batch,
    check_same_run,
)
from tp_trainer.data.sources import absolute, check_source
from tp_trainer.data.tokenizer import choose_tokenizer
from tp_trainer.driver.elsewhere import run_elsewhere
from tp_trainer.driver.ray_cluster import inside_ray_job
from tp_trainer.host import free_host_memory, gpus_here
from tp_trainer.summary import Summary
from tp_trainer.tracker import check_tracker
from tp_trainer.view import View


def prepare(config: Config) -> tuple[Config, str, str | None, Store]:
    """Everything that can be checked and settled without a cluster, in this order; `config` is
    completed in place.

    Returns the config, the tokenizer, what the user should know of it and of what is resumed or
    None, and the store of the run's directory.
    """
    _check_model_is_there(config.model.name)
    absolute(config.data)
    check_source(config.data)
    check_tracker(config)
    tokenizer, notice = choose_tokenizer(config.data, config.model, architecture(config).vocab_size)
    config.data.tokenizer = None if tokenizer == "none" else tokenizer
    _check_device(config)
    store = _open_store(config)
    resumed = _settle_global_batch(config, store)
    _check_writable(config, store)
    return config, tokenizer, "; ".join(filter(None, [notice, resumed])) or None, store


def _check_model_is_there(name: str | None) -> None:
    """A saved config brings the model's numbers along: nothing else would notice at once."""
    local = name is not None and name.startswith(("/", "~", "."))
    if name is not None and local and not os.path.isdir(os.path.expanduser(name)):
        raise ConfigError("model.name", name, "no such directory; give the one where it is now")


def _check_device(config: Config) -> None:
    """On this machine: GPUs enough for the mesh, or none and memory enough for CPU.
    `cluster.device` becomes what is used.
    """
    if config.cluster.kind != "local" or inside_ray_job():
        return  # known once connected
    world, gpus, asked = config.parallelism.world_size, gpus_here(), config.cluster.device
    if asked == "gpu" and not gpus:
        raise ConfigError(
            "cluster.device",
            "gpu",
            "this machine has no GPU; give cluster.device=cpu, or cluster=ray",
        )
    if asked != "cpu" and 0 < gpus < world:
        raise ConfigError(
            "parallelism",
            config.parallelism.layout,
            f"needs {world} GPUs, this machine has {gpus}; give a layout with tp x dp <= {gpus}, or"
            " cluster.device=cpu",
        )
    config.cluster.device = "gpu" if gpus and asked != "cpu" else "cpu"
    if config.cluster.device == "cpu":
        needed, free = 16 * architecture(config).num_parameters, free_host_memory()
        if free is not None and needed > free:
            raise ConfigError(
                "model.name",
                config.model.name,
                f"training on CPU needs about {needed / 2**30:.0f} GiB (16 bytes a parameter), "
                f"{free / 2**30:.0f} GiB are free; give a smaller model, or a machine with GPUs",
            )


def _open_store(config: Config) -> Store:
    try:
        return Store(config.run_dir)
    except ImportError as error:  # fsspec names the package for this kind of URL
        raise ConfigError(
            "checkpoint.storage_path", config.checkpoint.storage_path, f"needs a package: {error}"
        ) from error
    except ValueError as error:
        raise ConfigError(
            "checkpoint.storage_path",
            config.checkpoint.storage_path,
            f"no such kind of storage ({error})",
        ) from error


def _check_writable(config: Config, store: Store) -> None:
    """Makes the run's directory, and a file in it for a moment."""
    probe = f".writable-{uuid.uuid4().hex[:8]}"
    try:
        store.write_text(probe, "")
        store.remove(probe)
    except Exception as error:  # every file system has its own
        raise ConfigError(
            "checkpoint.storage_path", config.checkpoint.storage_path, f"not writable ({error})"
        ) from error


def _settle_global_batch(config: Config, store: Store) -> str | None:
    """The global batch is fixed at a run's first start: a resume takes it from the checkpoint, in
    whatever layout.

    Returns a sentence for the user, or None.
    """
    parallelism, train = config.parallelism, config.train
    try:
        found, notice = _resumed(config, store)
    except ConfigError:
        raise
    except Exception as error:  # every file system has its own
        why = f"whether {store.run_dir} holds checkpoints can't be told ({error})"
        raise ConfigError("checkpoint.storage_path", config.checkpoint.storage_path, why) from error
    if found is not None:
        size = found.state.global_batch_size
        if train.global_batch_size not in (None, size):
            raise ConfigError(
                "train.global_batch_size",
                train.global_batch_size,
                f"this run was started with {size}; leave it out, or give another experiment_name",
            )
        train.global_batch_size = size
        if train.max_steps is not None and train.max_steps < found.step:
            why = f"the run is at step {found.step} already"
            hint = "give at least that, or another experiment_name"
            raise ConfigError("train.max_steps", train.max_steps, f"{why}; {hint}")
    elif train.global_batch_size is None:
        train.global_batch_size = train.micro_batch_size * parallelism.dp
    check_global_batch(train.global_batch_size, train.micro_batch_size, parallelism.dp)
    return notice


def _resumed(config: Config, store: Store) -> tuple[VerifiedCheckpoint | None, str | None]:
    """The checkpoint that this start goes on from, as far as sizes tell; a sentence for the user.

    A run that was started from the checkpoint that `checkpoint.resume` names, and has gone on
    since, goes on from its own.

    Raises:
        ConfigError: there are checkpoints and none counts, or it is another run's.
    """
    resume, notice = config.checkpoint.resume, None
    if resume == "never":
        return None, None
    if resume != "auto":
        newest, passed_over = store.newest()
        begun = begun_from(store) == resume
        if begun and newest is None:
            check_some_count(store, resume, passed_over)
        if not begun or newest is None:
            return _pinned(config, store, newest)
        config.checkpoint.resume = "auto"
        notice = (
            f"checkpoint.resume={resume}: this run was started from it, "
            f"and goes on from its own step {newest.step}"
        )
    found, passed_over = store.newest()
    strays = store.strays()
    if found is None:
        check_some_count(store, resume, passed_over + strays)
        if _summary(store).get("status") != "finished":
            return None, run_elsewhere(config)
    notices = [notice] if notice else []
    notices += [f"passed over: {each}" for each in strays]  # of the others, the workers tell
    if (stored := _stored(config, store)) is not None:
        check_same_run(config, stored, store.run_dir)
    else:
        notices.append(_unknown(store))
    return found, "; ".join(notices) or None


def _pinned(
    config: Config, store: Store, newest: VerifiedCheckpoint | None
) -> tuple[VerifiedCheckpoint, str | None]:
    """The checkpoint that `checkpoint.resume` names. `newest`: that of the run's directory."""
    resume = config.checkpoint.resume
    found = named("checkpoint.resume", resume)
    roots = [each.root for each in (found.store, store)]
    own = len({os.path.realpath(root) for root in roots} if store.local else set(roots)) == 1
    stored = _stored(config, found.store)
    if stored is not None:
        check_same_run(config, stored, found.store.run_dir)
    if own and newest is not None and newest.step > found.step:
        why = (
            f"{config.experiment_name} has gone on to step {newest.step}; give another"
            " experiment_name"
        )
        more = " to branch off, or checkpoint.resume=auto to go on from there"
        raise ConfigError("checkpoint.resume", resume, why + more)
    others = [name for name in store.step_names() if store.check(name) != UNFINISHED]
    if not own and others:
        why = (
            f"{config.experiment_name} holds another run's {others[-1]}; give another"
            " experiment_name"
        )
        more = ", or checkpoint.resume=auto to go on with that one"
        raise ConfigError("checkpoint.resume", resume, why + more)
    return found, None if stored is not None else _unknown(found.store)


def begun_from(store: Store) -> str | None:
    """The checkpoint that this run was begun from, or what else `checkpoint.resume` was then."""
    with suppress(ValueError):
        stored = store.read_yaml("config.yaml") or {}
        resume = (stored.get("checkpoint") or {}).get("resume")
        return str(resume).rstrip("/") if resume else None
    return None


def to_record(config: Config, store: Store) -> str:
    """What config.yaml is to have as `checkpoint.resume`: a run that goes on stays one that was
    begun from where it was.
    """
    resume = config.checkpoint.resume
    goes_on = resume != "never" and store.newest()[0] is not None
    return (begun_from(store) or "auto") if goes_on else resume


def _stored(config: Config, store: Store) -> Mapping[str, Any] | None:
    """The config.yaml that lies beside checkpoints; None where there is none.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        stored = store.read_yaml("config.yaml")
        if stored is not None and not isinstance(stored.get("model"), dict):
            raise ValueError("it states no model")
    except ValueError as error:
        why = f"{store.run_dir}/config.yaml can't be read ({error}): it says what this run is"
        hint = "mend it, or move it away and nothing will be compared with it"
        raise ConfigError(
            "checkpoint.resume", config.checkpoint.resume, f"{why}; {hint}"
        ) from error
    return stored


def _unknown(store: Store) -> str:
    what = "whether its checkpoints are of the same run can't be told"
    return f"{store.run_dir} has no config.yaml: {what}"


def _summary(store: Store) -> Summary:
    summary = store.read_json("summary.json")
    return cast(Summary, summary) if isinstance(summary, dict) else {}


def finished(config: Config, store: Store) -> Summary | None:
    """The summary of this run where it has finished and no more is asked than was asked then.

    Whether other data is, the workers know.
    """
    allowed = {name.partition(".")[0] for name in config.checkpoint.allow_mismatch}
    auto = config.checkpoint.resume == "auto" and "data" not in allowed
    summary = _summary(store) if auto else None
    asked = {name: getattr(config.train, name) for name in RUN_LENGTH}
    if summary and summary.get("status") == "finished" and summary.get("run_length") == asked:
        return summary
    return None


def set_aside(config: Config, store: Store, view: View) -> None:
    """checkpoint.resume=never with a run of that name: what it wrote is kept under another name."""
    if not store.leftovers():
        return
    if not store.local:
        if all(store.check(name) == UNFINISHED for name in store.step_names()):
            return
        raise ConfigError(
            "checkpoint.resume",
            "never",
            f"{store.run_dir} holds checkpoints; give another experiment_name",
        )
    kept = f"{store.root}.before-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    os.makedirs(kept)
    for name in os.listdir(store.root):
        if name not in (OWNER, LOCK):  # they are this process's
            os.rename(f"{store.root}/{name}", f"{kept}/{name}")
    view.say(f"checkpoint.resume=never: the run that was there is kept as {kept}")
