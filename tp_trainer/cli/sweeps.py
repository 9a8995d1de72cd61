"""What the jobs of a sweep must not share."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tp_trainer.cli.arguments import as_typed, conf_dir, values_typed
from tp_trainer.cli.saved import follow_directory
from tp_trainer.config import Config, ConfigError, derived_name, load

IN_A_NAME = re.compile(r"[\w.-]+")  # what a directory's name takes as it stands


def settled(cfg: DictConfig) -> tuple[Config, list[str]]:
    """The checked Config of a composed job, whose `hydra` HydraConfig holds, and sentences for the
    user.

    Raises:
        ConfigError, OmegaConfBaseException: something in it doesn't do.
    """
    hydra = HydraConfig.get()
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    plain_values = {str(key): value for key, value in values.items()}
    directory = next(
        str(each.path) for each in hydra.runtime.config_sources if each.provider == "main"
    )
    typed = values_typed(as_typed(hydra))
    notices = follow_directory(plain_values, directory, str(hydra.job.config_name), typed)
    return load(plain_values), notices


def check_directories(jobs: Sequence[DictConfig]) -> None:
    """Jobs of one directory would go on with each other's run, or be done because another is.

    Args:
        jobs: each as it is composed; `hydra.job` becomes what it will be.

    Raises:
        ConfigError: two have the same, with a name that tells all jobs apart.
    """
    first = dict[str, int]()
    for number, cfg in enumerate(jobs):
        with open_dict(cfg.hydra):
            cfg.hydra.job.num, cfg.hydra.job.id = number, f"{cfg.hydra.job.name}_{number}"
        HydraConfig.instance().set_config(cfg)
        own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        try:
            config, _ = settled(own)
        except (ConfigError, OmegaConfBaseException):
            continue  # it is refused when its turn comes, and shares nothing
        if config.task == "train" and not config.dry_run:
            other = first.setdefault(config.run_dir, number)
            if other != number:
                raise _shared(config, (other, number), [as_typed(each.hydra) for each in jobs])


def _shared(config: Config, pair: tuple[int, int], jobs: Sequence[Sequence[str]]) -> ConfigError:
    named = [values_typed(job) for job in jobs]
    one, other = (named[number] for number in pair)
    varied = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    whole = {key for job in named for key in job if len({each.get(key) for each in named}) > 1}
    keys = [key for key in named[pair[1]] if key in whole and key != "experiment_name"]
    told_apart = [tuple(job.get(key, "") for key in keys) for job in named]
    tells = len(set(told_apart)) == len(jobs) and all(
        IN_A_NAME.fullmatch(value) for values in told_apart for value in values
    )
    groups = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    parts = [
        f"${{hydra:runtime.choices.{key}}}" if key in groups else f"${{{key}}}" for key in keys
    ]
    derived = config.experiment_name == derived_name(config)
    base = config.experiment_name.rsplit("-", 2)[0] if derived else config.experiment_name
    name = "-".join([base, *(parts if tells else ["${hydra:job.num}"])])
    differ = f", which differ in {', '.join(varied)}," if varied else ""
    return ConfigError(
        "experiment_name",
        "null" if derived else config.experiment_name,
        f"jobs {pair[0]} and {pair[1]}{differ} would share one run's directory, {config.run_dir};"
        f" type 'experiment_name={name}'",
    )


def check_earlier_jobs(job: dict[str, Any], sweep_dir: Path, config: Config) -> None:
    """Of a sweeper that picks its values as it goes.

    Raises:
        ConfigError: another job of the sweep, of other overrides, has this one's directory.
    """
    if config.task != "train" or config.dry_run:
        return
    for path in sweep_dir.glob("**/job.json"):
        with suppress(ValueError, OSError):  # one that is written right now
            other = json.loads(path.read_text(encoding="utf-8"))
            if (
                other["number"] != job["number"]
                and other["run_dir"] == config.run_dir
                and sorted(other["overrides"]) != sorted(job["overrides"])
            ):
                raise ConfigError(
                    "experiment_name",
                    config.experiment_name,
                    f"job {other['number']} of this sweep has the run's directory"
                    f" {config.run_dir}; type 'experiment_name=<name>-${{hydra:job.num}}'",
                )
