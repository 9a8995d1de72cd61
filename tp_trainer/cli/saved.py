"""A run's own config.yaml as the primary config: groups over it, and where the run lies now."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tp_trainer.cli.arguments import conf_dir
from tp_trainer.config import ConfigError
from tp_trainer.config.quoting import hydra_text

if TYPE_CHECKING:
    import argparse

WHOLE = {  # groups that a saved config has in full: another option would mix with that
    "model": "model.name=<hub id or directory> or model.overrides.<field>=<value>",
    "data": "data.source=<source> data.name=<name>",
    "experiment": "optim.lr=<value>",
}


def choose_groups(args: argparse.Namespace, directory: str, name: str) -> None:
    """Let `group=option` go over a saved config, which has no groups in its defaults list.

    What the option states wins over what was saved, what it doesn't state stays as it was, and
    single keys win over both. `args` is changed in place.

    Raises:
        ConfigError: a group that would mix with what was saved.
    """
    if not _without_groups(_read(directory, name)):
        return
    conf = conf_dir()
    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    overrides, chosen = [], False
    for override in args.overrides:
        key, equals, option = override.partition("=")
        group = key.lstrip("+")
        if group in groups and equals:
            if group in WHOLE:
                raise ConfigError(
                    group,
                    option,
                    "the saved config in --config-path has all of its keys, and the two would mix; "
                    f"give single keys, e.g. {WHOLE[group]}, or choose it without --config-path",
                )
            override, chosen = f"+{group}={option}", True
        overrides.append(override)
    if chosen and not any(each.startswith("hydra.searchpath") for each in overrides):
        overrides.append(f"hydra.searchpath=[{hydra_text(f'file://{conf.as_posix()}')}]")
    args.overrides = overrides


def follow_directory(
    values: dict[str, Any], directory: str, name: str, typed: Collection[str]
) -> list[str]:
    """The run that is meant by `--config-path <run>` is the one in that directory.

    Wherever it was when it wrote its config.

    Args:
        values: the composed config as plain dictionaries; changed in place.
        typed: the keys on the command line. They stay as they are.

    Returns:
        sentences for the user.
    """
    saved, place = _read(directory, name), Path(directory)
    checkpoint = saved.get("checkpoint")
    if (
        not _without_groups(saved)
        or not isinstance(checkpoint, dict)
        or not saved.get("experiment_name")
    ):
        return []
    storage, old_name = str(checkpoint.get("storage_path")), str(saved["experiment_name"])
    was = f"{storage.rstrip('/')}/{old_name}"
    if not _holds_run(place, was):
        return []
    said, moved = [], []
    for key, group, new, old in (
        ("experiment_name", values, place.name, old_name),
        ("checkpoint.storage_path", values["checkpoint"], str(place.parent), storage),
    ):
        if key not in typed:
            group[key.rpartition(".")[2]] = new
            if "://" in old or os.path.realpath(old) != os.path.realpath(new):
                moved.append(f"{key}={new}")
    if moved and os.path.realpath(was) != os.path.realpath(place):
        said.append(
            f"{place} was {was} when it was saved (moved or copied since): {', '.join(moved)}"
        )
    if values["checkpoint"].get("resume") == "never" and "checkpoint.resume" not in typed:
        values["checkpoint"]["resume"] = "auto"
        said.append(f"{place} was started with checkpoint.resume=never; here auto: it goes on")
    return said


def _read(directory: str, name: str) -> dict[str, Any]:
    """A primary config, interpolations as they stand; empty where it can't be read."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(Path(directory) / f"{name}.yaml"))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return {}
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def _without_groups(saved: dict[str, Any]) -> bool:
    """Whether a primary config stands on the schema alone, as those that runs write."""
    defaults = saved.get("defaults")
    if not isinstance(defaults, list) or "schema" not in defaults:
        return False
    return all(
        str(key).startswith("override hydra/")
        for each in defaults
        if isinstance(each, dict)
        for key in each
    )


def _holds_run(place: Path, was: str) -> bool:
    """Whether a run lies there: checkpoints, or its other files while nothing is where it was.

    A config.yaml alone is a copy to start from.
    """
    names = os.listdir(place)
    if any(each.startswith("step_") for each in names):
        return True
    return (
        bool({"metrics.jsonl", "summary.json"} & set(names))
        and "://" not in was
        and not os.path.exists(was)
    )
