"""The config of each job, composed before Hydra does; what goes wrong as one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tp_trainer.cli.arguments import as_typed, conf_dir, values_typed
from tp_trainer.cli.explain import explain
from tp_trainer.cli.sweeps import check_directories
from tp_trainer.cli.text import check_files, check_sweep
from tp_trainer.config import ConfigError

if TYPE_CHECKING:
    import argparse


def compose(args: argparse.Namespace, directory: str, name: str) -> tuple[int, Path | None]:
    """Compose what Hydra is about to compose: all of it, so that a sweep ends before its first job.

    Returns:
        the number of jobs of a sweep (0 where only its sweeper knows) and its directory, or (1,
        None) for a single run.

    Raises:
        ConfigError: something doesn't compose.
    """
    search_path = create_config_search_path(directory)
    if args.config_dir:
        search_path.prepend(
            "command-line",
            f"file://{Path(args.config_dir).resolve()}",
            SearchPathQuery(provider="schema"),
        )
    # `explain` lists its options
    if any(override.startswith("hydra.searchpath") for override in args.overrides):
        search_path.prepend("conf", f"file://{conf_dir()}", SearchPathQuery(provider="schema"))
    loader = Hydra.create_main_hydra2("tp_trainer", search_path).config_loader
    overrides: list[str] = args.overrides
    tried = overrides
    try:
        multirun = args.multirun and not args.help
        if (
            not multirun
            and not args.cfg
            and any("hydra.mode" in override for override in overrides)
        ):
            master = loader.load_configuration(
                name, overrides, RunMode.MULTIRUN, validate_sweep_overrides=False
            )
            multirun = master.hydra.mode == RunMode.MULTIRUN
        if not multirun:
            cfg = loader.load_configuration(name, overrides, RunMode.RUN)
            check_files(loader, name, overrides, RunMode.RUN)
            if cfg.hydra.mode != RunMode.MULTIRUN or args.cfg or args.help or args.info:
                return 1, None
        master = loader.load_configuration(name, overrides, RunMode.MULTIRUN)
        jobs, configs = _expand(master), []
        for job in jobs:
            tried = list(job)
            configs.append(loader.load_sweep_config(master, list(job)))
            check_files(loader, name, tried, RunMode.MULTIRUN)
        check_directories(configs)
        HydraConfig.instance().set_config(master)
        basic = master.hydra.sweeper._target_.endswith(".BasicSweeper")
        return len(jobs) if basic else 0, Path(str(master.hydra.sweep.dir)).resolve()
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise explain(error, values_typed(tried), loader) from error
    finally:
        GlobalHydra.instance().clear()


def _expand(master: DictConfig) -> list[list[str]]:
    """The overrides of each job. Another sweeper than Hydra's own picks its values later: of it,
    one job with every first value.
    """
    sweeper = master.hydra.sweeper
    basic = sweeper._target_.endswith(".BasicSweeper")
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()] if basic else []
    overrides = OverridesParser.create().parse_overrides([*params, *as_typed(master.hydra)])
    first: list[str] = []
    for override in overrides:
        check_sweep(override)
        key, value = override.get_key_element(), override.value()
        if not override.is_sweep_override():
            first.append(str(override.input_line))
        elif override.is_discrete_sweep():
            first.append(f"{key}={next(iter(override.sweep_string_iterator()))}")
        elif basic:
            raise ConfigError(
                key,
                str(override.input_line).partition("=")[2],
                "needs another sweeper (hydra/sweeper=optuna); here: a,b,c or range(a,b)",
            )
        elif isinstance(value, IntervalSweep):
            first.append(f"{key}={value.start}")
    return (
        [list(job) for job in BasicSweeper.split_arguments(overrides, None)[0]]
        if basic
        else [first]
    )
