"""The config of each job, composed before Hydra does; what goes wrong as one sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tp_trainer.config import RUN_LENGTH, ConfigError, known_keys, nearest, translate, unknown_key

if TYPE_CHECKING:
    import argparse


def compose(args: argparse.Namespace, directory: str, name: str) -> tuple[int, Path | None]:
    """Compose what Hydra is about to compose: all of it, so that a sweep ends before its first job.

    Returns:
        the number of jobs of a sweep (0 where only its sweeper knows) and its directory, or (1, None) for a single run.

    Raises:
        ConfigError: something doesn't compose.
    """
    search_path = create_config_search_path(directory)
    if args.config_dir:
        search_path.prepend("command-line", f"file://{Path(args.config_dir).resolve()}", SearchPathQuery(provider="schema"))
    loader = Hydra.create_main_hydra2("tp_trainer", search_path).config_loader
    overrides: list[str] = args.overrides
    tried = overrides
    try:
        multirun = args.multirun and not args.help
        if not multirun and not args.cfg and any("hydra.mode" in override for override in overrides):
            master = loader.load_configuration(name, overrides, RunMode.MULTIRUN, validate_sweep_overrides=False)
            multirun = master.hydra.mode == RunMode.MULTIRUN
        if not multirun:
            cfg = loader.load_configuration(name, overrides, RunMode.RUN)
            if cfg.hydra.mode != RunMode.MULTIRUN or args.cfg or args.help or args.info:
                return 1, None
        master = loader.load_configuration(name, overrides, RunMode.MULTIRUN)
        jobs = _expand(master)
        _check_directories(jobs)
        for job in jobs:
            tried = list(job)
            loader.load_sweep_config(master, list(job))
        HydraConfig.instance().set_config(master)
        basic = master.hydra.sweeper._target_.endswith(".BasicSweeper")
        return len(jobs) if basic else 0, Path(str(master.hydra.sweep.dir)).resolve()
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise explain(error, tried, loader) from error
    finally:
        GlobalHydra.instance().clear()


def _expand(master: DictConfig) -> list[list[str]]:
    """The overrides of each job. Another sweeper than Hydra's own picks its values later: of it, one job with every first value."""
    sweeper = master.hydra.sweeper
    basic = sweeper._target_.endswith(".BasicSweeper")
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()] if basic else []
    overrides = OverridesParser.create().parse_overrides([*params, *as_typed(master.hydra)])
    first: list[str] = []
    for override in overrides:
        key, value = override.get_key_element(), override.value()
        if not override.is_sweep_override():
            first.append(str(override.input_line))
        elif override.is_discrete_sweep():
            first.append(f"{key}={next(iter(override.sweep_string_iterator()))}")
        elif basic:
            raise ConfigError(
                key, str(override.input_line).partition("=")[2], "needs another sweeper (hydra/sweeper=optuna); here: a,b,c or range(a,b)"
            )
        elif isinstance(value, IntervalSweep):
            first.append(f"{key}={value.start}")
    return [list(job) for job in BasicSweeper.split_arguments(overrides, None)[0]] if basic else [first]


def _check_directories(jobs: Sequence[Sequence[str]]) -> None:
    """Jobs that differ in run length alone would have one derived name, and so go on with each other's run."""
    named = [values_typed(job) for job in jobs]
    for key in (f"train.{name}" for name in RUN_LENGTH):
        values = sorted({job.get(key, "") for job in named})
        if len(values) > 1 and not any("experiment_name" in job for job in named):
            raise ConfigError(key, ",".join(values), "jobs of different length would share one run's directory; "
                              f"add 'experiment_name=<name>-${{{key}}}'")  # fmt: skip


def explain(error: Exception, overrides: Sequence[str], loader: ConfigLoader) -> ConfigError:
    """What Hydra raised while composing, as one sentence about the override that caused it."""
    text, typed = str(error), values_typed(overrides)
    groups = [group for group in loader.list_groups("") if group != "hydra"]

    def options(group: str) -> list[str]:
        return loader.get_group_options(group, ObjectType.CONFIG)

    if isinstance(error, YAMLError):
        return ConfigError("", None, f"a config file can't be read: {text}")
    if isinstance(error, OverrideParseException):
        key, equals, value = error.override.partition("=")
        if not equals:
            return ConfigError(key, None, f"has no '='; type {key}=<value>, or {key}=null to unset it")
        if not re.fullmatch(r"[+~]*[\w./@-]+", key):
            return ConfigError(key, value, "is no key; keys are words with dots between, a list is given whole: key=[a,b]")
        return ConfigError(key, value, "can't be read; quote the value: " + f"'{key}=\"{value}\"'".replace('""', '"'))
    if isinstance(error, MissingConfigException):
        if not (found := re.match(r"(?:In '(.+?)': )?Could not find '(.+)/(.*)'", text)):
            return ConfigError("", None, text.splitlines()[0])
        place, group, option = found.groups()
        near = nearest(option, options(group))
        where = "" if place in (None, "config", "hydra/config") else f" (in {place})"
        return ConfigError(
            group, option, f"no such option{where}; {f'did you mean {near}? ' if near else ''}options: {', '.join(options(group))}"
        )
    if found := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)=(.*)'(?:$| requires)", text, re.MULTILINE):
        key, value = found.groups()
        return ConfigError(key, value, f"one value is wanted; a list is {key}=[a,b], a sweep needs -m (--multirun)")
    if "Config group override must be" in text:  # Hydra doesn't say which one: a group given a number, null or no key at all
        if "" in typed:
            return ConfigError("", None, f"={typed['']}: has no key; type key=value")
        key = next((key for key in typed if key in groups and nearest(typed[key], options(key)) is None), "")
        return ConfigError(key, typed.get(key), f"the name of an option is wanted; options: {', '.join(options(key))}")
    if found := re.match(r"'?(.+?)'? appears more than once|force-add of config groups is not supported: '\+\+(.+?)=", text):
        key = found[1] or found[2]
        return ConfigError(key, typed.get(key), f"a group is chosen without +: {key}={typed.get(key, '<option>')}")
    if found := re.search(r"Could not delete from config. '(.+?)' does not exist", text):
        if found[1] not in known_keys():
            return unknown_key(found[1])
        return ConfigError(f"~{found[1]}", None, f"keys can't be deleted; {found[1]}=null unsets it")
    if found := re.search(r"(?:Override |Could not override ')((\w+)@[^=']+)", text):
        group = nearest(found[2], groups) or "<group>"
        return ConfigError(found[1], typed.get(found[1]), f"groups keep their place here; type {group}=<option>")

    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException):
        refused = translate(cause)
        if place := re.match(r"In '(.+?)':", text):  # the fault is in a file
            return ConfigError(refused.key, refused.value, f"{refused.message} (in {place[1]}.yaml)")
        if below := next((key for key in typed if key.startswith(f"{refused.key}.") and refused.key not in typed), None):
            return unknown_key(below, typed[below])  # OmegaConf names the level at which it stopped
        if not refused.key.startswith("_"):  # `_dummy_`: Hydra's own scaffolding
            return ConfigError(refused.key, typed.get(refused.key, refused.value), refused.message)
    key = next((key for key, value in typed.items() if key and (f"{key}=" in text or (value and value in text))), "")
    return ConfigError(key, typed.get(key), text.splitlines()[0].rstrip("."))


def as_typed(hydra: Any) -> list[str]:
    """A job's overrides. Reading them one by one would resolve the interpolations in them, secrets from the environment too."""
    overrides = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return [str(override) for override in overrides]


def values_typed(overrides: Sequence[str]) -> dict[str, str]:
    """Keys and values as they were typed."""
    return dict(override.lstrip("+~").partition("=")[::2] for override in overrides)
