"""Launchers that start a script once for each rank, and what they leave in the environment; what
processes that are started from here find on their path.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tp_trainer.config import ConfigError

# what torchrun sets, and those who do as it does
VARIABLES = {"MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK"}
VARIABLES |= {"WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME"}
PREFIX = "TORCHELASTIC_"
MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate.commands.launch": "accelerate",
    "deepspeed.launcher.launch": "deepspeed",
}
TORCH = ("torchrun", "accelerate", "deepspeed")
MPI = ("mpirun", "mpiexec", "orterun", "prterun", "orted", "prted", "hydra_pmi_proxy")
# how many processes MPI's launchers or Slurm's have started
COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
ALONE = (".batch", ".interactive", ".extern")  # steps of Slurm's that are no srun's


def forget() -> None:
    """Take a launcher's variables out of this process's environment: torch would go by them, and
    wait for ranks that nobody has started."""
    for name in [each for each in os.environ if each in VARIABLES or each.startswith(PREFIX)]:
        del os.environ[name]


@contextmanager
def safe_path() -> Iterator[None]:
    """For the Pythons that are started meanwhile, a sweep's or Ray's, and theirs: those that
    multiprocessing and joblib start with -c or -m would have the working directory first.
    """
    given = "PYTHONSAFEPATH" in os.environ
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    try:
        yield
    finally:
        if not given:
            os.environ.pop("PYTHONSAFEPATH", None)


def refuse() -> None:
    """Raises ConfigError where this process is one of a launcher's ranks."""
    name = launcher(os.environ, _ancestors())
    if name is not None:
        raise ConfigError(
            name,
            None,
            "starts this program once for each rank, and it starts its workers itself, tp x dp of"
            " them; run it once, as in python launch.py parallelism=tp2_dp2",
        )


def launcher(environment: Mapping[str, str], ancestors: Iterable[list[str]]) -> str | None:
    """What has started this process as one of its ranks; None where nothing has.

    Variables alone may be left of another run: it must be among the `ancestors`, whose commands
    these are.
    """
    several = any(environment.get(name, "1") not in ("", "0", "1") for name in COUNTS)
    known = (TORCH if "RANK" in environment else ()) + (MPI if several else ())
    for words in ancestors if known else ():
        title = " ".join(words)
        if several and title.startswith("slurmstepd:") and not any(each in title for each in ALONE):
            return "srun"
        for before, word in zip(["", *words], words[:5], strict=False):
            name = MODULES.get(word, "") if before == "-m" else os.path.basename(word)
            if name.removesuffix(".hydra") in known:
                return name
    return None


def _ancestors() -> Iterator[list[str]]:
    """The command of this process's parent, of that one's, and so on, as /proc has them."""
    pid = os.getppid()
    with suppress(OSError, ValueError):
        while pid > 0:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            yield command.rstrip("\0").split("\0")
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            pid = int(stat.rpartition(")")[2].split()[1])
