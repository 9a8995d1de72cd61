"""A job of Hydra's: its task, its exit code; of a sweep's jobs, a report each and the table."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tp_trainer.cli.again import command_of
from tp_trainer.cli.arguments import as_typed, values_typed
from tp_trainer.cli.mesh import draw_mesh
from tp_trainer.cli.sweeps import check_earlier_jobs, settled
from tp_trainer.config import COMMAND, Config, ConfigError, plain, translate
from tp_trainer.tasks import LOSS, TASKS

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
# the worst of losses: optuna's sweeper takes it and goes on, NaN or an exception would end the
# sweep
NO_OBJECTIVE = math.inf


def app(cfg: DictConfig) -> float:
    """What Hydra calls for each job. Returns what sweepers minimise (see `_execute`)."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _sweep_job(cfg)
    try:
        return _execute(_load(cfg))
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            raise
        complain(error)
        sys.exit(code)


def _load(cfg: DictConfig) -> Config:
    """The checked Config of a composed job. Raises ConfigError, with the value as it was typed."""
    hydra = HydraConfig.get()
    typed = values_typed(as_typed(hydra))
    try:
        config, notices = settled(cfg)
        os.environ[COMMAND] = json.dumps(command_of(hydra, config))
        for notice in notices:
            print(notice, flush=True)
        return config
    except (ConfigError, OmegaConfBaseException) as error:
        refused = error if isinstance(error, ConfigError) else translate(error)
        raise ConfigError(
            refused.key, typed.get(refused.key, refused.value), refused.message
        ) from error


def _execute(config: Config) -> float:
    """Do the task. Returns the number that sweepers minimise; infinite where it gave none."""
    if config.dry_run:
        shown = plain(config)
        shown["cluster"]["env"] = dict.fromkeys(config.cluster.env, "***")
        print(OmegaConf.to_yaml(OmegaConf.create(shown)))
        print(draw_mesh(config.parallelism))
        return NO_OBJECTIVE
    task = TASKS[config.task]
    objective = task.objective.of(task.run(config))
    return NO_OBJECTIVE if objective is None else objective


def _exit_code(error: Exception) -> int | None:
    """2 for what the user asked, 1 for a run that failed with a line of its own, None for what
    nobody foresaw.
    """
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
    job: dict[str, Any] = {
        "number": hydra.job.num,
        "task": cfg.get("task"),
        "overrides": as_typed(hydra),
        "status": "running",
        "objective": None,
        "run_dir": None,
        "error": None,
    }

    def write(**changes: Any) -> None:
        job.update(changes)
        path.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")

    write()
    try:
        config = _load(cfg)
        check_earlier_jobs(job, Path(hydra.sweep.dir), config)
        write(run_dir=config.run_dir)
        objective = _execute(config)
        write(status="done", objective=objective if math.isfinite(objective) else None)
        return objective
    except Exception as error:
        code = _exit_code(error)
        if code is None:
            traceback.print_exc()
        complain(
            f"job {job['number']}:"
            f" {error if code is not None else f'{type(error).__name__}: {error}'}"
        )
        write(status="refused" if code == REFUSED else "failed", error=" ".join(str(error).split()))
        return NO_OBJECTIVE
    except BaseException:
        write(status="interrupted")
        raise


def complain(error: object) -> None:
    """One line on stderr."""
    # paths keep their spaces
    print("error:", re.sub(r"\s*\n\s*", " ", str(error).strip()), file=sys.stderr)


def report_sweep(sweep_dir: Path, expected: int) -> bool:
    """Print the table of a sweep's jobs. Returns whether all of them are done."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    jobs = []
    for path in sweep_dir.glob("**/job.json"):
        with suppress(ValueError):  # a job that was killed while it wrote
            jobs.append(json.loads(path.read_text(encoding="utf-8")))
    jobs.sort(key=lambda job: job["number"])
    common = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    table = Table(
        title=f"{len(jobs)} jobs of {sweep_dir}", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("job", justify="right")
    table.add_column("what varied", overflow="fold")
    table.add_column("status")
    kinds = {TASKS[job["task"]].objective for job in jobs if job["task"] in TASKS}
    objective = kinds.pop() if len(kinds) == 1 else LOSS
    table.add_column(objective.title, justify="right")
    table.add_column("run directory", overflow="fold")
    for job in jobs:
        varied = " ".join(override for override in job["overrides"] if override not in common)
        value = "" if job["objective"] is None else objective.shown(job["objective"])
        table.add_row(str(job["number"]), varied, job["status"], value, job["run_dir"] or "")
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    console.print(table)
    return len(jobs) >= expected and all(job["status"] == "done" for job in jobs)
