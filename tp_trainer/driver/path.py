"""What Ray's workers find on their `sys.path`."""

from __future__ import annotations

import os
import sys
from typing import Any

import tp_trainer


def job_config(own: bool) -> Any:
    """Ray's description of a job, but that its workers don't get the driver's working directory.

    Ray puts it first: a `statistics.py` beside the data would stand before Python's.

    Args:
        own: whether this process starts the Ray, whose workers then have its environment.
    """
    from ray.job_config import JobConfig

    class Job(JobConfig):
        def _get_proto_job_config(self) -> Any:
            paths: list[str] = self._py_driver_sys_path
            paths[:] = worker_paths(paths, own)
            return super()._get_proto_job_config()

    return Job()


def worker_paths(given: list[str], own: bool) -> list[str]:
    """What Ray puts on its workers' path, of the directories that it would: the script's and the
    working one. The one of this package as well, where they may not find it otherwise.
    """
    here, root = os.path.realpath(os.curdir), os.path.realpath(tp_trainer.ROOT)
    needed = root in map(os.path.realpath, given)
    if own:
        needed = tp_trainer.BESIDE_SCRIPT or tp_trainer.ROOT not in sys.path
    paths = [each for each in given if os.path.realpath(each) not in (here, root)]
    return paths + [tp_trainer.ROOT] * needed
