"""How the program stands to what starts it: torchrun and its like, the working directory, uv."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tp_trainer
from tp_trainer import cli, launchers
from tp_trainer.config import DIRECTORY, Cluster, ConfigError, imported
from tp_trainer.driver import path, ray_cluster

ROOT = Path(__file__).resolve().parent.parent
RANK = {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
MPI = {"OMPI_COMM_WORLD_SIZE": "2"}
STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
TORCHRUN = "/venv/bin/python3 /venv/bin/torchrun --nproc-per-node=2 launch.py"


@pytest.mark.parametrize(
    ("environment", "parent", "name"),
    [
        (RANK, TORCHRUN, "torchrun"),
        (RANK, "python -m torch.distributed.run launch.py", "torchrun"),
        (RANK, "python -u -m torch.distributed.launch launch.py", "torchrun"),
        (RANK, "python /venv/bin/accelerate launch launch.py", "accelerate"),
        (RANK, "python -u -m deepspeed.launcher.launch --world_info=x launch.py", "deepspeed"),
        (MPI, "mpirun -n 2 python launch.py", "mpirun"),
        ({"PMI_SIZE": "2"}, "/opt/mpi/bin/hydra_pmi_proxy --control-port h:1", "hydra_pmi_proxy"),
        (STEP, "slurmstepd: [17.0]", "srun"),
        # what is left of another run
        (RANK, "bash", None),
        (MPI, "bash", None),
        (STEP, "bash", None),
        # one process, or a batch script's own
        ({"OMPI_COMM_WORLD_SIZE": "1"}, "mpirun -n 1 python launch.py", None),
        ({}, "python /venv/bin/accelerate launch launch.py", None),
        (STEP, "slurmstepd: [17.batch]", None),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, "slurmstepd: [17.0]", None),
        # what only looks like one
        (RANK, "bash -c torchrun\xa0launch.py", None),
        (RANK, "python launch.py data.name=torchrun", None),
        (RANK, "mpirun -n 1 python launch.py", None),
    ],
)
def test_which_launcher_has_started_it(
    environment: dict[str, str], parent: str, name: str | None
) -> None:
    ancestors = [["sh", "train.sh"], parent.split(" "), ["/sbin/init"]]
    assert launchers.launcher(environment, ancestors) == name


def test_its_own_ancestors_are_read() -> None:
    commands = list(launchers._ancestors())
    assert commands and all(command[0] for command in commands if command != [""])


@pytest.mark.parametrize("there", [True, False], ids=["launched", "left behind"])
def test_under_torchrun_and_with_what_it_left(
    there: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused; or gone, and what isn't its own stays."""
    left = {**RANK, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "0"}
    for name, value in {**left, "TORCHELASTIC_USE_AGENT_STORE": "True", "OTHER": "x"}.items():
        monkeypatch.setenv(name, value)
    parents = [TORCHRUN.split() if there else ["bash"]]
    monkeypatch.setattr(launchers, "_ancestors", lambda: iter(parents))
    code: Any = 0
    try:
        cli.main(["dry_run=true"])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    if there:
        assert code == 2 and err.startswith("error: torchrun: starts this") and err.count("\n") == 1
    else:
        gone = {*left, "TORCHELASTIC_USE_AGENT_STORE"}
        assert code == 0 and not gone & set(os.environ) and os.environ["OTHER"] == "x"


def test_torchrun_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*command, str(ROOT / "launch.py")], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.returncode == 1 and "(exitcode: 2)" in ended.stderr, ended
    assert "error: torchrun: starts this program once" in ended.stderr, ended
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------ the path


@pytest.mark.parametrize(
    ("own", "beside", "found", "expected"),
    [
        (True, False, True, ["/scripts"]),  # installed
        (True, True, True, ["/scripts", tp_trainer.ROOT]),  # beside launch.py
        (True, False, False, ["/scripts", tp_trainer.ROOT]),  # by way of the working directory
        (False, False, True, ["/scripts", tp_trainer.ROOT]),  # where the nodes may not have it
    ],
)
def test_workers_do_not_get_the_working_directory(
    own: bool,
    beside: bool,
    found: bool,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tp_trainer, "BESIDE_SCRIPT", beside)
    others = [each for each in sys.path if os.path.realpath(each) != tp_trainer.ROOT]
    monkeypatch.setattr(sys, "path", others + [tp_trainer.ROOT] * found)
    given = ["/scripts", str(tmp_path), tp_trainer.ROOT]
    assert path.worker_paths(given, own) == expected


@pytest.mark.usefixtures("without_ray")
def test_a_ray_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told what its workers' path is, and packs nothing for them under uv."""
    given: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", raising=False)
    monkeypatch.setattr("ray.init", lambda **options: given.update(options))
    monkeypatch.setattr(ray_cluster, "_owns_ray", [])
    with ray_cluster.connected(Cluster(kind="local"), 1):
        assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"
    job = given["job_config"]
    job._py_driver_sys_path.extend(["/scripts", str(tmp_path)])  # as ray.init does
    sent = list(job._get_proto_job_config().py_driver_sys_path)
    assert sent[0] == "/scripts" and str(tmp_path) not in sent


@pytest.mark.usefixtures("without_ray")
def test_a_cluster_under_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray sends the working directory there, and wants the project in it; what it raises was seen
    in 2.60."""

    def init(**options: Any) -> None:
        assert "job_config" in options and "py_modules" in options["runtime_env"]
        raise RuntimeError("Your /p/pyproject.toml is not in the working_dir /p/sub, so ...")

    monkeypatch.setattr("ray.init", init)
    with (
        pytest.raises(ConfigError, match="address=auto: under `uv run` Ray sends the working"),
        ray_cluster.connected(Cluster(kind="ray"), 1),
    ):
        pass


def test_what_lies_beside_launch_py(tmp_path: Path) -> None:
    """Python puts its directory first: a module of that name there would be imported."""
    for name in ("tp_trainer", "conf"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "assets")
        )
    shutil.copy(ROOT / "launch.py", tmp_path)
    for name in ("difflib", "hydra", "statistics"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('shadowed')")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        [sys.executable, "launch.py", "--cfg", "job"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0 and "parallelism" in ended.stdout, ended


def test_what_a_key_names_is_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("records_beside_the_data", "statistics"):
        (tmp_path / f"{name}.py").write_text("import statistics\nMINE = statistics.mean([1, 3])\n")
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", os.curdir)])
    monkeypatch.setenv(DIRECTORY, str(tmp_path))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("records_beside_the_data")
    try:
        assert imported("records_beside_the_data:MINE") == 2 and sys.path[-1] == str(tmp_path)
    finally:
        sys.modules.pop("records_beside_the_data", None)
    with pytest.raises(ModuleNotFoundError):
        imported("nowhere_to_be_found:MINE")
