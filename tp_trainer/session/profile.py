"""The profiler of a training, `train.profile`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from tp_trainer.config import Config


def profiler(config: Config, tell: Callable[[Sequence[str]], None]) -> torch.profiler.profile:
    """A profiler of `train.profile.steps` steps of rank 0, its Chrome trace in <run>/profile.

    Args:
        tell: takes sentences for the user.
    """

    def write(profiler: torch.profiler.profile) -> None:
        try:
            profiler.export_chrome_trace(f"{folder}/rank0.json")
        except (OSError, RuntimeError) as error:  # no trace is worth a training
            tell([f"warning: the profiler's trace can't be written to {folder} ({error})"])

    folder = (
        f"{config.run_dir}/profile" if "://" not in config.run_dir else os.path.abspath("profile")
    )
    os.makedirs(folder, exist_ok=True)
    schedule = torch.profiler.schedule(
        wait=config.train.profile.start, warmup=1, active=config.train.profile.steps, repeat=1
    )
    return torch.profiler.profile(schedule=schedule, on_trace_ready=write)
