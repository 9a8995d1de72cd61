"""Config -> Ray Train's TorchTrainer: checks, capacity, start, live view, summary; `run_jobs` for
tasks. It knows Ray, but no torch.
"""

from tp_trainer.driver.errors import RunFailed
from tp_trainer.driver.preflight import prepare
from tp_trainer.driver.ray_cluster import run_jobs, started
from tp_trainer.driver.training import train
from tp_trainer.driver.workers import fit_once

__all__ = ["RunFailed", "fit_once", "prepare", "run_jobs", "started", "train"]
