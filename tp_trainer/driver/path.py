"""What Ray's workers find on their `sys.path`."""

from __future__ import annotations

import os
import sys
from typing import Any

import tp_trainer


def job_config() -> Any:
    """Ray's description of a job, but that its workers don't get the driver's working directory.

    Ray puts it first: a `statistics.py` beside the data would stand before Python's. This package
    is found where the driver's Python finds it, or is put there.
    """
    from ray.job_config import JobConfig

    class Job(JobConfig):
        def _get_proto_job_config(self) -> Any:
            paths: list[str] = self._py_driver_sys_path
            paths[:] = worker_paths(paths)
            return super()._get_proto_job_config()

    return Job()


def worker_paths(given: list[str]) -> list[str]:
    """What Ray puts on its workers' path, of the directories that it would: the script's and the
    working one."""
    needed = tp_trainer.BESIDE_SCRIPT or tp_trainer.ROOT not in sys.path
    left = {os.path.realpath(each) for each in (os.curdir, tp_trainer.ROOT)}
    paths = [each for each in given if os.path.realpath(each) not in left]
    return paths + [tp_trainer.ROOT] * needed
