"""Hydra's entry: composition errors as one line, dispatch of the task, the sweep's table, exit codes.

Nothing here imports torch or ray, so that `--help`, shell completion and every refusal answer at once. Hydra itself ends
a bad command line with several lines and 1; here the config is composed first with Hydra's own loader, what that raises is
translated (`explain`), and only then Hydra runs. `tests/test_cli.py` holds every message against the installed Hydra.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra import version
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, create_config_search_path, get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
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

from tp_trainer.config import (
    RUN_LENGTH,
    Config,
    ConfigError,
    Parallelism,
    known_keys,
    load,
    nearest,
    plain,
    translate,
    unknown_key,
)

if TYPE_CHECKING:
    import argparse

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
TASKS = {  # what a task calls with the checked Config; imported only then, since all of them import ray
    "train": "tp_trainer.tasks.train:run",
    "export": "tp_trainer.tasks.export:run",
    "verify": "tp_trainer.tasks.verify:run",
    "bench": "tp_trainer.tasks.bench:run",
}
NO_OBJECTIVE = math.inf  # the worst of losses: optuna's sweeper takes it and goes on, NaN or an exception would end the sweep

# Dictionaries without a schema inside: Hydra wants a + before a new key in them. Here a plain key=value does.
OPEN_KEY = re.compile(r"(?:model\.overrides|model\.architecture|cluster\.env)(?:\.[^=]+)?=")

ConfigStore.instance().store(name="schema", node=Config)


def main(argv: Sequence[str] | None = None) -> None:
    """`python launch.py` and `tp-trainer`. Returns when all went well, else raises SystemExit with the exit code."""
    version.setbase("1.3")
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        complain(error)
        code = REFUSED
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code:
        sys.exit(code)


def complain(error: object) -> None:
    """One line on stderr."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)


def _main(argv: list[str]) -> int:
    args, parser = _arguments(argv)
    directory, name = _primary_config(args)
    sweep_dir, jobs = None, 0
    if not (args.shell_completion or args.hydra_help):
        jobs, sweep_dir = _compose(args, directory, name)
    if sweep_dir is not None:
        # Hydra would take the time anew; and reports of an older sweep in a directory that the user named are not this one's
        quoted = str(sweep_dir).replace("\\", "\\\\").replace("'", "\\'")
        args.overrides.append(f"hydra.sweep.dir='{quoted}'")
        for report in sweep_dir.glob("**/job.json"):
            report.unlink()
    all_done = True
    try:
        _run_hydra(args=args, args_parser=parser, task_function=app, config_path=directory, config_name=name)
    finally:  # a sweep that is stopped half-way has its table too
        if sweep_dir is not None:
            all_done = _report_sweep(sweep_dir, jobs)
    return DONE if all_done else FAILED


def conf_dir() -> Path:
    """conf inside the installed package, else beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    return next((path for path in (package / "conf", package.parent / "conf") if path.is_dir()), package / "conf")


# -------------------------------------------------------------------------------------------------------- arguments


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Hydra's own arguments, with its usage errors as ConfigError and overrides allowed on both sides of a flag."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError("", None, f"{message}; see python launch.py --help")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun", args.experimental_rerun, "not supported; --config-path <run's directory> runs it again")
    if args.run + args.multirun + args.shell_completion + (args.cfg is not None) + (args.info is not None) > 1:
        refuse("only one of --run, --multirun, --cfg, --info and --shell-completion can be given")
    if args.resolve and args.cfg is None and not args.help:
        refuse("--resolve goes with --cfg or --help")
    args.overrides = [f"++{override}" if OPEN_KEY.match(override) else override for override in args.overrides]
    return args, parser


def _primary_config(args: argparse.Namespace) -> tuple[str, str]:
    """Directory (absolute) and name of the primary config, checked; `args` has the same afterwards."""
    name = (args.config_name or "config").removesuffix(".yaml")
    directory = args.config_path or str(conf_dir())
    if args.config_path and "://" not in directory:
        path = Path(directory).expanduser().resolve()  # Hydra would take it relative to this file
        if path.is_file():
            raise ConfigError("--config-path", args.config_path, f"is a file; give its directory: --config-path {path.parent}")
        if not path.is_dir():
            raise ConfigError("--config-path", args.config_path, "no such directory; a run's directory or one with a config.yaml is wanted")
        directory = str(path)
    if "://" not in directory and not (Path(directory) / f"{name}.yaml").is_file():
        has_own = args.config_dir and (Path(args.config_dir) / f"{name}.yaml").is_file()
        if args.config_path:
            raise ConfigError(
                "--config-path", args.config_path, f"holds no {name}.yaml; a run's directory or one with a primary config is wanted"
            )
        if not has_own:
            raise ConfigError(
                "--config-name", args.config_name, f"no {name}.yaml in {directory}; a run's config.yaml: --config-path <run's directory>"
            )
    if args.config_dir:
        added = Path(args.config_dir).expanduser()
        if not added.is_dir():
            raise ConfigError("--config-dir", args.config_dir, "no such directory")
        if (added / f"{name}.yaml").is_file() and (Path(directory) / f"{name}.yaml").is_file():
            # Hydra looks in its own directory first: it would run the defaults and say nothing
            shadowed = f"its {name}.yaml would not be read, {directory} has one too"
            raise ConfigError("--config-dir", args.config_dir, f"{shadowed}; to run it: --config-path {args.config_dir}")
        args.config_dir = str(added)
    args.config_path, args.config_name = directory, name
    return directory, name


# ------------------------------------------------------------------------------------------------------ composition


def _compose(args: argparse.Namespace, directory: str, name: str) -> tuple[int, Path | None]:
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
    overrides = OverridesParser.create().parse_overrides([*params, *_as_typed(master.hydra)])
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
    named = [dict(_typed(job)) for job in jobs]
    for key in (f"train.{name}" for name in RUN_LENGTH):
        values = sorted({job.get(key, "") for job in named})
        if len(values) > 1 and not any("experiment_name" in job for job in named):
            raise ConfigError(key, ",".join(values), "jobs of different length would share one run's directory; "
                              f"add 'experiment_name=<name>-${{{key}}}'")  # fmt: skip


def explain(error: Exception, overrides: Sequence[str], loader: ConfigLoader) -> ConfigError:
    """What Hydra raised while composing, as one sentence about the override that caused it."""
    text, typed = str(error), _typed(overrides)
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


def _as_typed(hydra: Any) -> list[str]:
    """A job's overrides. Reading them one by one would resolve the interpolations in them, secrets from the environment too."""
    overrides = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return [str(override) for override in overrides]


def _typed(overrides: Sequence[str]) -> dict[str, str]:
    """Keys and values as they were typed."""
    return dict(override.lstrip("+~").partition("=")[::2] for override in overrides)


# ------------------------------------------------------------------------------------------------------------- jobs


def app(cfg: DictConfig) -> float:
    """What Hydra calls for each job. Returns the objective (see `_objective`)."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _sweep_job(cfg)
    try:
        return _objective(_execute(_load(cfg)))
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        complain(error)
        sys.exit(code)


def _load(cfg: DictConfig) -> Config:
    """The checked Config of a composed job. Raises ConfigError, with the value as it was typed."""
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(values, dict)
        return load({str(key): value for key, value in values.items()})
    except (ConfigError, OmegaConfBaseException) as error:
        refused = error if isinstance(error, ConfigError) else translate(error)
        typed = _typed(_as_typed(HydraConfig.get()))
        raise ConfigError(refused.key, typed.get(refused.key, refused.value), refused.message) from error


def _execute(config: Config) -> dict[str, Any]:
    """Do the task; its summary."""
    if config.dry_run:
        shown = plain(config)
        shown["cluster"]["env"] = dict.fromkeys(config.cluster.env, "***")
        print(OmegaConf.to_yaml(OmegaConf.create(shown)))
        print(draw_mesh(config.parallelism))
        return {}
    module, _, name = TASKS[config.task].partition(":")
    summary: dict[str, Any] = getattr(importlib.import_module(module), name)(config)
    return summary


def _objective(summary: dict[str, Any]) -> float:
    """What sweepers minimise: the final validation loss, of a bench minus the tokens/s of a worker; infinite where there is none."""
    if (rate := summary.get("tokens_per_second_per_gpu")) is not None:
        return -float(rate)
    loss = summary.get("validation_loss")
    return NO_OBJECTIVE if loss is None else float(loss)


def _exit_code(error: Exception) -> int | None:
    """2 for what the user asked, 1 for a run that failed with a line of its own, None for what nobody foresaw."""
    if isinstance(error, ConfigError):
        return REFUSED
    driver = sys.modules.get("tp_trainer.driver")
    return FAILED if driver is not None and isinstance(error, driver.RunFailed) else None


def _sweep_job(cfg: DictConfig) -> float:
    """One job of a sweep: whatever becomes of it is written to job.json, and the sweep goes on.

    A file, because a launcher may run jobs in other processes, on other machines.
    """
    hydra = HydraConfig.get()
    path = Path(hydra.runtime.output_dir) / "job.json"
    job: dict[str, Any] = {"number": hydra.job.num, "task": cfg.get("task"), "overrides": _as_typed(hydra), "status": "running",
                           "objective": None, "run_dir": None, "error": None}  # fmt: skip

    def write(**changes: Any) -> None:
        job.update(changes)
        path.write_text(json.dumps(job, indent=1) + "\n")

    write()
    try:
        config = _load(cfg)
        write(run_dir=config.run_dir)
        objective = _objective(_execute(config))
        write(status="done", objective=objective if math.isfinite(objective) else None)
        return objective
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            traceback.print_exc()
        complain(f"job {job['number']}: {error if code is not None else f'{type(error).__name__}: {error}'}")
        write(status="refused" if code == REFUSED else "failed", error=" ".join(str(error).split()))
        return NO_OBJECTIVE
    except BaseException:
        write(status="interrupted")
        raise


def _report_sweep(sweep_dir: Path, expected: int) -> bool:
    """Print the table of a sweep's jobs. Returns whether all of them are done."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    jobs = []
    for path in sweep_dir.glob("**/job.json"):
        with suppress(ValueError):  # a job that was killed while it wrote
            jobs.append(json.loads(path.read_text()))
    jobs.sort(key=lambda job: job["number"])
    common = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    table = Table(title=f"{len(jobs)} jobs of {sweep_dir}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("job", justify="right")
    table.add_column("what varied", overflow="fold")
    table.add_column("status")
    benches = bool(jobs) and all(job["task"] == "bench" for job in jobs)
    table.add_column("tokens/s per worker" if benches else "validation loss", justify="right")
    table.add_column("run directory", overflow="fold")
    for job in jobs:
        varied = " ".join(override for override in job["overrides"] if override not in common)
        objective = "" if job["objective"] is None else f"{-job['objective']:,.0f}" if benches else f"{job['objective']:.4f}"
        table.add_row(str(job["number"]), varied, job["status"], objective, job["run_dir"] or "")
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    console.print(table)
    return len(jobs) >= expected and all(job["status"] == "done" for job in jobs)


# ------------------------------------------------------------------------------------------------------------- mesh


def draw_mesh(parallelism: Parallelism) -> str:
    """The mesh as a grid: a row for each data-parallel rank, a column for each tensor-parallel rank, workers' numbers inside."""
    tp, dp, replicas = parallelism.tp, parallelism.dp, parallelism.dp_replicate
    shards = dp // replicas

    def group(workers: Sequence[int]) -> str:
        return "{" + ", ".join(map(str, workers)) + "}"

    sizes = f"dp_replicate={replicas}, dp={shards}, tp={tp}" if replicas > 1 else f"dp={dp}, tp={tp}"
    workers = tp * dp
    lines = [f"mesh ({sizes}): {workers} worker{'s' if workers > 1 else ''}", ""]
    labels = [f"replica {row // shards}, dp {row % shards}" if replicas > 1 else f"dp {row}" for row in range(dp)]
    width, cell = max(map(len, labels)) + 2, max(len(str(workers)), len(f"tp {tp - 1}")) + 2
    lines.append(" " * width + "".join(f"tp {rank}".rjust(cell) for rank in range(tp)))
    for row, label in enumerate(labels):
        if row and row % shards == 0:
            lines.append("")
        ranks = range(row * tp, (row + 1) * tp)
        lines.append(label.ljust(width) + "".join(str(rank).rjust(cell) for rank in ranks) + f"    TP group {group(ranks)}")
    lines.append("")
    for rank in range(tp):
        column = range(rank, workers, tp)
        line = f"DP group of tp {rank}: {group(column)}"
        if replicas > 1:
            parts = [group(column[replica * shards : (replica + 1) * shards]) for replica in range(replicas)]
            line += f", sharded over {' and '.join(parts)}, replicated across them"
        lines.append(line)
    return "\n".join(lines)
