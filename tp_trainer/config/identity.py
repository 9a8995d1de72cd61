"""What makes a run the same run: the choices that shape its numbers, its derived name, what a
resume may not change.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tp_trainer.config.architecture import FROM_FILE
from tp_trainer.config.errors import ConfigError, nearest, shown
from tp_trainer.config.resolved import Config

RUN_LENGTH = ("num_epochs", "max_steps_per_epoch", "max_steps")
INTERVALS = (
    "log_interval",
    "eval_interval",
    "eval_batches",
    "drift_interval",
    "profile",
    "max_skipped_steps",
)


PATHS = ("model.name", "model.architecture._name_or_path", "data.name", "data.tokenizer")


def canonical(name: str | None) -> str | None:
    """A local path or glob in full, links followed; a hub id as it stands."""
    if name is None or "://" in name:
        return name
    path = os.path.expanduser(name)
    local = os.path.isabs(path) or os.path.exists(path) or glob.has_magic(path)
    return os.path.realpath(path) if local else name


def choices(config: Config) -> dict[str, Any]:
    """Every choice that shapes the numbers of a run, by group: run length, intervals and where it
    runs left out.
    """
    return _choices(asdict(config))


def _choices(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {
        key: dict(values[key]) for key in ("model", "parallelism", "data", "optim", "train")
    } | {"seed": values["seed"]}
    model, data, parallelism = kept["model"], kept["data"], kept["parallelism"]
    for key in RUN_LENGTH + INTERVALS:
        del kept["train"][key]
    del model["recipe"], data["cache_dir"]
    model["overrides"] = {}  # they are in the architecture
    model["architecture"] = dict(model["architecture"])
    model["architecture"].pop(FROM_FILE, None)
    for key in ("family", "revision"):  # runs from before there was a choice keep their names
        if model[key] is None:
            del model[key]
    for key in ("cuda_graphs", "async_tp", "direct_fsdp", "reshard_after_forward"):
        del parallelism[key]
    if data["revision"] is None:  # what it is where it is null, the tokens' own check holds
        del data["revision"]
    if not parallelism["float8"]:  # runs from before there was a choice keep their names
        del parallelism["float8"]
    for group, name in ((model, "name"), (model["architecture"], "_name_or_path"), (data, "name")):
        if name in group:
            group[name] = canonical(group[name])
    if data["tokenizer"] != "embedded":
        data["tokenizer"] = canonical(data["tokenizer"])
    return kept


RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._=,+-]*"
NAME_BYTES = 200  # of a derived name; beside it lies <name>.before-<time>, and 255 is the most


def derived_name(config: Config) -> str:
    """A name that is the same for the same choices: a readable part and a hash of all that shapes
    the numbers.
    """
    digest = hashlib.sha256(
        json.dumps(choices(config), sort_keys=True, default=str).encode()
    ).hexdigest()[:8]
    data = str(config.data.source)
    if config.data.name:
        data = Path(str(canonical(config.data.name))).stem
    end = f"{config.parallelism.layout}-{digest}"
    name = _plain(f"{model_name(config)}-{data}-{end}")
    if re.fullmatch(RUN_NAME, name) and len(name) <= NAME_BYTES:
        return name
    most = (NAME_BYTES - len(end) - 2) // 2
    models = (model_name(config), str(config.model.architecture["model_type"]), "model")
    model = next(filter(None, (_plain(each).lstrip("._-") for each in models)))
    return f"{model[:most]}-{_plain(data)[:most]}-{end}"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lower()


def is_derived(config: Config) -> bool:
    """Whether the run's name is one that `derived_name` makes."""
    end = rf"-{config.parallelism.layout}-[0-9a-f]{{8}}"
    return re.search(rf"{end}\Z", config.experiment_name) is not None


def model_name(config: Config) -> str:
    """A short name of the model: the last part of its hub id or directory, else its type."""
    fields = config.model.architecture
    return Path(str(config.model.name or fields.get("_name_or_path") or fields["model_type"])).name


# the batch and the tokens have checks of their own
MAY_CHANGE = ("train.micro_batch_size", "train.global_batch_size", "data.revision")


def check_same_run(config: Config, stored: Mapping[str, Any], place: str) -> None:
    """Raises ConfigError where a resume would change what a run is, with every field that differs.

    Layout (but not the precision of its arithmetic), micro-batch, run length and intervals may
    change, and what `checkpoint.allow_mismatch` names.

    Args:
        stored: the config.yaml that the checkpoint was made with, as plain dictionaries.
        place: the directory that it lies in.
    """
    mine, theirs, differing = _differing(config, stored)
    if not differing:
        return

    def said(value: Any) -> str:
        return "null" if value is None else shown(value)

    first, *others = differing
    more = "".join(f"; {key}={said(mine.get(key))}: with {said(theirs.get(key))}" for key in others)
    auto = (
        "give another experiment_name (null derives one), or checkpoint.resume=never to start it"
        " anew"
    )
    hint = auto if config.checkpoint.resume == "auto" else "leave as they were"
    raise ConfigError(
        first,
        said(mine.get(first)),
        f"the run in {place} was started with {said(theirs.get(first))}{more}; "
        f"{hint}, or let it through: checkpoint.allow_mismatch={shown(differing)}",
    )


def _differing(
    config: Config, stored: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any], list[str]]:
    """What is compared of this run and of a stored one, and the keys that a resume may not change.

    A path that differs is no other choice: what lies there decides, as far as sizes tell here, and
    as the tokens say later.
    """
    mine, theirs = _mine(config), _compared(stored)
    # a key that one of them lacks came or went with a release; of an architecture, every field
    # counts
    keys = [key for key in mine if key in theirs or key.startswith(ARCHITECTURE)]
    keys += [key for key in theirs if key not in mine and key.startswith(ARCHITECTURE)]
    differing = [
        key
        for key in keys
        if mine.get(key) != theirs.get(key)
        and not (key in PATHS and _may_be_the_same(mine.get(key), theirs.get(key)))
        and not _allowed(key, config.checkpoint.allow_mismatch)
    ]
    return mine, theirs, differing


def paths_alone(config: Config, stored: Mapping[str, Any]) -> list[str] | None:
    """Of a stored run whose choices are this one's but for paths, those paths: `key=path`. None of
    another run.
    """
    mine, theirs = ({**_flat(each, "")} for each in (choices(config), _choices(stored)))
    batch = "train.global_batch_size"
    mine[batch] = mine[batch] or config.train.micro_batch_size * config.parallelism.dp
    keys = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    if any(key not in PATHS or not _may_be_the_same(mine[key], theirs[key]) for key in keys):
        return None
    return [f"{key}={theirs[key]}" for key in keys]


def _may_be_the_same(mine: Any, theirs: Any) -> bool:
    """Whether two paths may lead to the same content: one is gone, or their files' sizes agree."""
    if not all(isinstance(each, str) and os.path.isabs(each) for each in (mine, theirs)):
        return False
    if os.path.realpath(mine) == os.path.realpath(theirs):
        return True
    here, there = _sizes(mine), _sizes(theirs)
    return not here or not there or here == there


def _sizes(path: str) -> list[int]:
    """The sizes of the files of a path or a glob, by their names; none where nothing is there."""
    found = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    below = (
        sorted(each for each in Path(name).rglob("*") if each.is_file())
        if os.path.isdir(name)
        else [Path(name)]
        for name in found
    )
    with suppress(OSError):
        return [each.stat().st_size for files in below for each in files]
    return []


def check_same_tokens(config: Config, mine: str, theirs: str | None, place: str) -> None:
    """Raises ConfigError where a resume would go on with other tokens than it was started with,
    whatever the keys say.

    Args:
        mine: the identity of the training tokens.
        theirs: that of the checkpoint's run; None where it doesn't say.
    """
    allowed = any(
        _allowed(key, config.checkpoint.allow_mismatch) for key in ("data.name", "data.tokenizer")
    )
    if theirs not in (None, mine) and not allowed:
        of_hub = config.data.source == "hub"
        hint = "give data.revision=<the commit it was trained on>, " if of_hub else "give "
        raise ConfigError(
            "data.source",
            config.data.source,
            f"these are other tokens than {place} was trained on (another text or tokenizer of the"
            f" same name); {hint}another experiment_name, or let it through:"
            " checkpoint.allow_mismatch=[data]",
        )


def check_mismatch_names(config: Config) -> None:
    """Raises ConfigError for a name in `checkpoint.allow_mismatch` that no resume compares."""
    compared = [key for key in _mine(config) if key not in MAY_CHANGE]
    names = {key.rsplit(".", depth)[0] for key in compared for depth in range(3)}
    for name in config.checkpoint.allow_mismatch:
        if name not in names and not name.startswith(ARCHITECTURE):
            near = nearest(name, sorted(names))
            raise ConfigError(
                "checkpoint.allow_mismatch",
                name,
                "no resume compares that"
                + (
                    f"; did you mean {near}?"
                    if near
                    else "; a key of model, data, optim or train is wanted, seed, or one of "
                    + ", ".join(PRECISION)
                ),
            )


ARCHITECTURE = "model.architecture."


def _allowed(key: str, names: Sequence[str]) -> bool:
    """A name stands for itself and for all below it."""
    return key in MAY_CHANGE or any(key == name or key.startswith(f"{name}.") for name in names)


# the one part of `parallelism` that isn't layout
PRECISION = ("parallelism.float8", "parallelism.param_dtype", "parallelism.reduce_dtype")


def _mine(config: Config) -> dict[str, Any]:
    return _compared({**choices(config), "parallelism": asdict(config.parallelism)})


def _compared(values: Mapping[str, Any]) -> dict[str, Any]:
    groups = [group for group in ("seed", "model", "data", "optim", "train") if group in values]
    leaves = {key: leaf for group in groups for key, leaf in _flat(values[group], group).items()}
    leaves.pop(ARCHITECTURE + FROM_FILE, None)
    layout = _flat(values.get("parallelism", {}), "parallelism")
    return leaves | {key: layout[key] for key in PRECISION if key in layout}


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in _flat(part, f"{prefix}.{name}".lstrip(".")).items()
    }
