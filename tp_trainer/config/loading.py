"""From plain dictionaries to a checked, resolved Config and back; OmegaConf's errors reworded."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tp_trainer.config.architecture import architecture, architecture_fields
from tp_trainer.config.errors import ConfigError
from tp_trainer.config.identity import derived_name
from tp_trainer.config.resolved import (
    Config,
    ResolvedCluster,
    ResolvedData,
    ResolvedModel,
    ResolvedOptim,
)
from tp_trainer.config.rules import check, check_fields
from tp_trainer.config.schema import Model, Recipe, Settings, known_keys
from tp_trainer.config.source import source_of


def load(values: Mapping[str, Any]) -> Config:
    """A checked, resolved Config from a plain dictionary (the command line's, a saved
    config.yaml's, a worker's).

    Raises:
        ConfigError: an unknown key, a wrong type, a value or a combination that is not allowed.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.create(dict(values)))
        settings = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise translate(error) from error
    assert isinstance(settings, Settings)
    check_fields(settings, "")
    config = resolve(settings)
    check(config)
    return config


def plain(config: Config) -> dict[str, Any]:
    """The Config as plain dictionaries, lists and scalars: what travels to the workers and into
    config.yaml.
    """
    return dataclasses.asdict(config)


# environment: the words of the command that runs this job again, as JSON (cli -> driver)
COMMAND = "TP_TRAINER_COMMAND"
# environment: the most workers that any job of this sweep has (cli -> driver)
SWEEP_WORKERS = "TP_TRAINER_SWEEP_WORKERS"

HYDRA: dict[str, Any] = {
    "job": {"name": "tp_trainer", "chdir": False},
    "run": {"dir": "."},
    "sweep": {"dir": "multirun/${now:%Y-%m-%d}/${now:%H-%M-%S}", "subdir": "${hydra.job.num}"},
    "output_subdir": None,
    "job_logging": {"root": {"level": "WARNING"}},
}  # the block of conf/config.yaml


def to_yaml(config: Config) -> str:
    """The Config as a primary config of its own: `--config-path <its directory>` runs it again,
    through the same schema.

    What follows from other keys as plainly as the number of workers is left null, so that an
    override of those moves it. `cluster.env` may hold secrets: its names are written, its values
    come from the environment of whoever runs it again.
    """
    values = plain(config)
    if config.cluster.num_workers == config.parallelism.world_size:
        values["cluster"]["num_workers"] = None
    if config.checkpoint.resume == "never":  # of this start: whoever runs it again wants to go on
        values["checkpoint"]["resume"] = "auto"
    values["cluster"]["env"] = {name: f"${{oc.env:{name}}}" for name in config.cluster.env}
    defaults = ["schema", "_self_", {"override hydra/job_logging": "stdout"}]
    return str(
        OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults, "hydra": HYDRA, **values}))
    )


def resolve(settings: Settings) -> Config:
    """What a run knows: what is null and follows from other keys is filled in.

    train.global_batch_size stays null: the driver fixes it at a run's first start, or takes the
    checkpoint's.
    """
    data, checkpoint, cluster = settings.data, settings.checkpoint, settings.cluster
    source = data.source
    if source is None and settings.task != "export":  # which reads no data
        source = source_of(data.name)
    model, recipe = _resolve_model(settings.model)
    length = data.seq_length or recipe.seq_length
    if length is None:
        numbers = architecture(dataclasses.replace(settings, model=model))
        length = min(2048, numbers.max_position_embeddings)
    lr = settings.optim.lr
    if lr is None:
        lr = recipe.lr or (1e-5 if model.weights == "pretrained" else 3e-4)
    storage_path, resume = _absolute(checkpoint.storage_path), checkpoint.resume
    if resume not in ("auto", "never"):
        resume = _absolute(resume).rstrip("/")
    workers = cluster.num_workers or settings.parallelism.world_size
    config = Config(
        **_but(settings, "experiment_name", "model", "data", "optim", "cluster", "checkpoint"),
        experiment_name=settings.experiment_name or "",
        model=model,
        data=ResolvedData(**_but(data, "source", "seq_length"), source=source, seq_length=length),
        optim=ResolvedOptim(**_but(settings.optim, "lr"), lr=lr),
        cluster=ResolvedCluster(**_but(cluster, "num_workers"), num_workers=workers),
        checkpoint=dataclasses.replace(checkpoint, storage_path=storage_path, resume=resume),
    )
    # last but for the batch: the name must not depend on what is only derived
    if settings.experiment_name is None:
        config.experiment_name = derived_name(config)
    return config


def _resolve_model(model: Model) -> tuple[ResolvedModel, Recipe]:
    """The model with all of its numbers, and what its group suggests, if it is the group's."""
    name = model.name
    if name is not None and Path(name).expanduser().is_dir():
        name = str(Path(name).expanduser().resolve())
    grouped = bool(model.architecture) and name in (None, model.architecture.get("_name_or_path"))
    fields = architecture_fields(dataclasses.replace(model, name=name))
    if name is not None:
        fields["_name_or_path"] = name  # so that it is taken as it stands when loaded again
    weights = model.weights or ("random" if name is None else "pretrained")
    resolved = ResolvedModel(
        **_but(model, "name", "weights", "architecture"),
        name=name,
        weights=weights,
        architecture=fields,
    )
    return resolved, model.recipe if grouped else Recipe()


def _but(group: object, *names: str) -> dict[str, Any]:
    """The values of a group, but for those of that name."""
    return {key: value for key, value in vars(group).items() if key not in names}


def _absolute(path: str) -> str:
    """A local path in full; a URL as it stands."""
    return path if "://" in path else str(Path(path).expanduser().resolve())


def translate(error: Exception) -> ConfigError:
    """OmegaConf's several lines about a key or a type, as one."""
    key = str(getattr(error, "full_key", None) or "")
    first = str(error).strip().splitlines()[0]
    if "not in '" in first or "is not in struct" in first:
        return unknown_key(key or first)
    if not key and (match := re.search(r"is not a subclass of (\w+)", first)):
        key = match[1].lower()  # the groups' classes are named after them
    inside = [k for k in known_keys() if k.startswith(key + ".")]
    if inside and (
        "is not a subclass of" in first or "Cannot convert" in first or "Cannot merge" in first
    ):
        return ConfigError(key, None, f"is a group of keys, not a value; give {', '.join(inside)}")
    match = re.search(
        r"Value '(.*)' (?:of type '\w+' could not be converted to|is not a valid) (\w+)",
        first,
        re.DOTALL,
    )
    if match:
        wanted = {
            "Integer": "a whole number",
            "Float": "a number",
            "Boolean": "true or false",
            "bool": "true or false",
        }
        return ConfigError(
            key,
            None if match[1] == "{}" else match[1],
            f"must be {wanted.get(match[2], match[2].lower())}",
        )
    if (
        "is not a ListConfig" in first
        or "list index out of range" in first
        or "Cannot merge ListConfig" in first
    ):
        return ConfigError(key.split("[")[0], None, "must be a whole list, e.g. [0.9,0.95]")
    if "Cannot merge DictConfig" in first:
        return ConfigError(key, None, "must be keys and values, e.g. {NAME: value}")
    if "Cannot convert" in first:
        return ConfigError(key, None, "must be one value, not a list or keys and values")
    if "raised while resolving interpolation" in first:
        first = first.split(": ", 1)[-1].strip("\"'")
    return ConfigError(key, None, first.rstrip("."))


def unknown_key(key: str, value: object = None) -> ConfigError:
    """The error for a key that the schema doesn't have, with the nearest one that it has."""
    keys = known_keys()
    group, _, last = key.rpartition(".")
    groups = [each.name for each in dataclasses.fields(Settings) if each.name not in keys] + [
        "experiment"
    ]
    near = difflib.get_close_matches(key, [*groups, *(k for k in keys if "." not in k)], n=1)
    if not group and near and near[0] in groups:
        return ConfigError(
            key, value, f"unknown group; did you mean {near[0]}? groups: {', '.join(groups)}"
        )
    # not what a user types
    keys = [k for k in keys if not k.startswith("model.recipe.") or group == "model.recipe"]
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == group]
    names = [k.rpartition(".")[2] for k in keys]

    def close(name: str, among: Sequence[str]) -> list[str]:
        return difflib.get_close_matches(name, among, n=1)

    # the same name in another group, a near one in this group, a near one in any group
    hints = [k for k in keys if k.rpartition(".")[2] == last]
    hints += [f"{group}.{name}".lstrip(".") for name in close(last, siblings)]
    hints += [keys[names.index(name)] for name in close(last, names)] + (
        [] if group and siblings else close(key, keys)
    )
    if hints:
        return ConfigError(key, value, f"unknown key; did you mean {hints[0]}?")
    if group and siblings:
        return ConfigError(key, value, f"unknown key; {group} has: {', '.join(siblings)}")
    part = "hydra" if group.startswith("hydra") else "job"
    return ConfigError(
        key, value, f"unknown key; python launch.py --cfg {part} prints all that there are"
    )
