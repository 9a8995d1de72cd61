"""Hydra's entry: composition errors as one line, dispatch of the task, the sweep's table, exit
codes.

Nothing here imports torch or ray, so that `--help`, shell completion and every refusal answer at
once. Hydra itself ends a bad command line with several lines and 1; here the config is composed
first with Hydra's own loader, what that raises is translated (`composition`), and only then Hydra
runs. `tests/test_cli.py` holds every message against the installed Hydra.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hydra import version
from hydra._internal.utils import _run_hydra

from tp_trainer.cli.arguments import arguments, primary_config
from tp_trainer.cli.composition import compose
from tp_trainer.cli.jobs import DONE, FAILED, INTERRUPTED, REFUSED, app, complain, report_sweep
from tp_trainer.cli.locale import leave_ascii
from tp_trainer.cli.saved import choose_groups
from tp_trainer.cli.text import keep_text
from tp_trainer.config import ConfigError
from tp_trainer.config.quoting import hydra_text
from tp_trainer.launchers import forget, refuse, safe_path
from tp_trainer.tasks import help_lines
from tp_trainer.terminal import outlive


def main(argv: Sequence[str] | None = None) -> None:
    """`python launch.py` and `tp-trainer`. Returns when all went well, else raises SystemExit with
    the exit code.
    """
    if argv is None:
        leave_ascii()
    version.setbase("1.3")
    try:
        refuse()
        forget()
        outlive()
        code = _main(list(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        complain(error)
        code = REFUSED
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code:
        sys.exit(code)


def _main(argv: list[str]) -> int:
    args, parser = arguments(argv)
    directory, name = primary_config(args)
    choose_groups(args, directory, name)
    args.overrides = keep_text(args.overrides)
    sweep_dir, jobs = None, 0
    if not (args.shell_completion or args.hydra_help):
        jobs, sweep_dir = compose(args, directory, name)
    if sweep_dir is not None:
        # Hydra would take the time anew; and reports of an older sweep in a directory that the user
        # named are not this one's
        args.overrides.append(f"hydra.sweep.dir={hydra_text(str(sweep_dir))}")
        for report in sweep_dir.glob("**/job.json"):
            report.unlink()
    if args.help:
        print(help_lines(), end="\n\n")
    all_done = True
    try:
        with safe_path():
            _run_hydra(
                args=args,
                args_parser=parser,
                task_function=app,
                config_path=directory,
                config_name=name,
            )
    finally:  # a sweep that is stopped half-way has its table too
        if sweep_dir is not None:
            all_done = report_sweep(sweep_dir, jobs)
    return DONE if all_done else FAILED
