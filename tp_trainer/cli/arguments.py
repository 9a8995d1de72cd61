"""The command line, and which config it names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from tp_trainer.config import ConfigError, Settings
from tp_trainer.config.quoting import word

if TYPE_CHECKING:
    import argparse

# Dictionaries without a schema inside: Hydra wants a + before a new key in them. Here a plain
# key=value does.
OPEN_KEY = re.compile(r"(?:model\.overrides|cluster\.env)(?:\.[^=]+)?=")
# model.name replaces the architecture of the group chosen; what is typed goes over either
TYPED_FIELD = re.compile(r"^\+{0,2}model\.architecture(?=\.|=\{)")

ConfigStore.instance().store(name="schema", node=Settings)


def conf_dir() -> Path:
    """conf inside the installed package, else beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(
        (path for path in (package / "conf", package.parent / "conf") if path.is_dir()),
        package / "conf",
    )


def arguments(argv: list[str]) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Hydra's own arguments, with its usage errors as ConfigError and overrides allowed on both
    sides of a flag.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError("", None, f"{message}; see python launch.py --help")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun is not None:
        raise ConfigError(
            "--experimental-rerun",
            args.experimental_rerun,
            "not supported; --config-path <run's directory> runs it again",
        )
    if (
        args.run
        + args.multirun
        + args.shell_completion
        + (args.cfg is not None)
        + (args.info is not None)
        > 1
    ):
        refuse("only one of --run, --multirun, --cfg, --info and --shell-completion can be given")
    if args.resolve and args.cfg is None and not args.help:
        refuse("--resolve goes with --cfg or --help")
    typed = [TYPED_FIELD.sub("model.overrides", override) for override in args.overrides]
    args.overrides = [f"++{each}" if OPEN_KEY.match(each) else each for each in typed]
    return args, parser


def primary_config(args: argparse.Namespace) -> tuple[str, str]:
    """Directory (absolute) and name of the primary config, checked; put into `args` as well."""
    name = (args.config_name or "config").removesuffix(".yaml")
    directory = args.config_path or str(conf_dir())
    if args.config_path and "://" not in directory:
        path = Path(directory).expanduser().resolve()  # Hydra would take it relative to this file
        if path.is_file():
            raise ConfigError(
                "--config-path",
                args.config_path,
                f"is a file; give its directory: --config-path {word(path.parent)}",
            )
        if not path.is_dir():
            raise ConfigError(
                "--config-path",
                args.config_path,
                "no such directory; a run's directory or one with a config.yaml is wanted",
            )
        directory = str(path)
    if "://" not in directory and not (Path(directory) / f"{name}.yaml").is_file():
        has_own = args.config_dir and (Path(args.config_dir) / f"{name}.yaml").is_file()
        if args.config_path:
            raise ConfigError(
                "--config-path",
                args.config_path,
                f"holds no {name}.yaml; a run's directory or one with a primary config is wanted",
            )
        if not has_own:
            raise ConfigError(
                "--config-name",
                args.config_name,
                f"no {name}.yaml in {directory}; a run's config.yaml: --config-path <run's"
                " directory>",
            )
    if args.config_dir:
        added = Path(args.config_dir).expanduser()
        if not added.is_dir():
            raise ConfigError("--config-dir", args.config_dir, "no such directory")
        if (added / f"{name}.yaml").is_file() and (Path(directory) / f"{name}.yaml").is_file():
            # Hydra looks in its own directory first: it would run the defaults and say nothing
            shadowed = f"its {name}.yaml would not be read, {directory} has one too"
            raise ConfigError(
                "--config-dir",
                args.config_dir,
                f"{shadowed}; to run it: --config-path {word(args.config_dir)}",
            )
        args.config_dir = str(added)
    args.config_path, args.config_name = directory, name
    return directory, name


def values_typed(overrides: Sequence[str]) -> dict[str, str]:
    """Keys and values as they were typed."""
    return dict(override.lstrip("+~").partition("=")[::2] for override in overrides)


def as_typed(hydra: Any) -> list[str]:
    """A job's overrides. Reading them one by one would resolve the interpolations in them, secrets
    from the environment too.
    """
    overrides = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(overrides, list)
    return [str(override) for override in overrides]
