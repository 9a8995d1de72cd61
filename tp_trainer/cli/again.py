"""The command that runs a job again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tp_trainer.cli.arguments import OPEN_KEY, as_typed, conf_dir
from tp_trainer.config import Config
from tp_trainer.config.quoting import hydra_text


def command_of(hydra: Any, config: Config) -> list[str]:
    """The words of the command that runs this job alone, of a sweep too.

    Values of `cluster.env` are left to the environment: they may be secrets.
    """
    words = [*_program(sys.argv[0]), *_flags(hydra)]
    groups = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    resolved = {
        "experiment_name": config.experiment_name,
        "checkpoint.storage_path": config.checkpoint.storage_path,
    }
    secret = False
    for override in as_typed(hydra):
        key, _, value = override.partition("=")
        plain = key.lstrip("+")
        if plain.split(".")[:2] == ["cluster", "env"]:
            secret = True
        # of a sweep's job number, say; Hydra has escaped it
        elif plain in resolved and "${" in value.replace("\\", ""):
            words.append(f"{plain}={hydra_text(str(resolved[plain]))}")
        else:  # the + that this program has put before it is not for the user to type
            words.append(
                f"{plain}={value}" if plain in groups or OPEN_KEY.match(f"{plain}=") else override
            )
    if secret:
        words += [f"cluster.env.{name}=${{oc.env:{name}}}" for name in config.cluster.env]
    return words


def _program(script: str) -> list[str]:
    if Path(script).name == "__main__.py":
        return ["python", "-m", "tp_trainer"]
    if script.endswith(".py"):
        return ["python", script]
    return [Path(script).name or "tp-trainer"]


def _flags(hydra: Any) -> list[str]:
    """Which primary config, where it isn't the product's own."""
    paths = {str(each.provider): str(each.path) for each in hydra.runtime.config_sources}
    flags = []
    if Path(paths["main"]).resolve() != conf_dir():
        flags += ["--config-path", paths["main"]]
    if "command-line" in paths:
        flags += ["--config-dir", paths["command-line"]]
    return flags + (
        ["--config-name", str(hydra.job.config_name)] if hydra.job.config_name != "config" else []
    )
