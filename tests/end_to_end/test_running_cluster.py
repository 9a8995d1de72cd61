"""A Ray that runs already: cluster=ray by its address, and the job that is submitted to it."""

from __future__ import annotations

import json
import re
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ROOT, Ended, Launcher, rows_of, steps_of, summary_of

pytestmark = pytest.mark.slow

SECRETS = {
    "HF_TOKEN": "hf_SwordfishOfTheHub",
    "FOO": "SwordfishOfTheCluster",
    "BAR": "SwordfishAsTyped",
}


class Cluster(Launcher):
    """A Ray of four CPUs, started by `ray start`, whose workers follow the orders of each run."""

    def __init__(self, cwd: Path, cache: Path) -> None:
        super().__init__(cwd, cache)
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            self.port, client_port = one.getsockname()[1], two.getsockname()[1]
        self.orders.write_text("{}")
        # what `ray start` asks for from 2.60 on
        self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
        command = [
            str(Path(sys.executable).parent / "ray"),
            "start",
            "--head",
            "--block",
            "--num-cpus=4",
            f"--port={self.port}",
            f"--ray-client-server-port={client_port}",
            "--include-dashboard=false",
            f"--temp-dir={self.ray_dir}/ray",
            "--disable-usage-stats",
        ]
        self.head = self.execute(command, self.env | self.hook_env)
        self.until(lambda: any("raylet" in title for title in self.processes().values()), self.head)
        self.until(lambda: "--block" in self.said(), self.head)

    def said(self) -> str:
        return Path(f"/proc/{self.head.pid}/fd/1").read_text()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"), cache)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def told(cluster: Cluster) -> tuple[Ended, Path, list[dict[str, str]], list[str]]:
    """A run on the cluster with secrets in its environment: how it ended, its directory, the
    workers' environments and packages.
    """
    told, run = cluster.cwd / "told", cluster.storage / "told"
    told.mkdir()
    # launch.py, but from where no worker finds it: Ray adds the script's and the working directory
    # to the workers' path
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tp_trainer.cli import main; main()",
    ]
    overrides = [
        "cluster=ray",
        f"cluster.address={cluster.address}",
        "experiment_name=told",
        "train.max_steps=3",
        "cluster.env.FOO=${oc.env:SECRET}",
        f"cluster.env.BAR={SECRETS['BAR']}",
    ]
    cluster.orders.write_text(json.dumps({"tell": str(told)}))
    ended = cluster.execute(
        [*command, *cluster.quick, *overrides],
        cluster.env | {"HF_TOKEN": SECRETS["HF_TOKEN"], "SECRET": SECRETS["FOO"]},
    ).wait()
    cluster.orders.write_text("{}")
    assert ended.code == 0 and ended.err == "", ended
    seen = [json.loads(path.read_text()) for path in sorted(told.iterdir())]
    for path in told.iterdir():
        path.unlink()
    return ended, run, [each["environ"] for each in seen], [each["package"] for each in seen]


def test_a_run_on_a_running_cluster(
    cluster: Cluster, told: tuple[Ended, Path, list[dict[str, str]], list[str]]
) -> None:
    _, run, environs, packages = told
    assert summary_of(run)["status"] == "finished" and list(steps_of(run)) == [1, 2, 3]
    assert len(environs) == 4 and len(cluster.sessions()) == 1
    for package in packages:
        assert package.startswith(f"{cluster.sessions()[0]}/runtime_resources/py_modules_files/"), (
            "the package travels with the job"
        )
    assert cluster.head.process.poll() is None, "the cluster stays"
    cluster.until(lambda: not cluster.workers())


@pytest.mark.matrix
def test_secrets_reach_the_workers_and_no_log(
    cluster: Cluster, told: tuple[Ended, Path, list[dict[str, str]], list[str]]
) -> None:
    ended, _, environs, _ = told
    for environ in environs:
        assert {name: environ[name] for name in SECRETS} == SECRETS
    assert "wordfish" not in ended.out + ended.err
    searched = [
        path
        for root in (cluster.cwd, cluster.ray_dir)
        for path in root.rglob("*")
        if path.is_file() and not path.is_symlink()
    ]
    assert len(searched) > 50
    for path in searched:
        assert b"wordfish" not in path.read_bytes(), path


def test_more_workers_than_the_cluster_has(cluster: Cluster) -> None:
    ended = cluster.run("cluster=ray", f"cluster.address={cluster.address}", "parallelism=tp4_dp2")
    assert ended.code == 2 and ended.err.count("\n") == 1, ended
    assert ended.err.startswith(
        "error: parallelism=tp4_dp2: needs 8 workers with 1 CPUs each, the cluster has 4 CPUs"
    ), ended
    ended = cluster.run("cluster=ray", f"cluster.address={cluster.address}", "cluster.device=gpu")
    assert (
        ended.code == 2
        and ended.err
        == "error: cluster.device=gpu: the cluster has no GPU; give cluster.device=cpu\n"
    ), ended
    assert not cluster.workers()


@pytest.mark.matrix
def test_a_job_joins_its_own_cluster(cluster: Cluster) -> None:
    """The environment in which `ray job submit` runs an entrypoint: the default command starts no
    second Ray.
    """
    job = {
        "RAY_ADDRESS": cluster.address,
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": {"A": "b"}}}),
    }
    ended = cluster.run("parallelism=tp1_dp2", "experiment_name=job", "train.max_steps=3", env=job)
    assert ended.code == 0 and ended.err == "", ended
    assert (
        summary_of(cluster.storage / "job")["world"] == 2
        and len(rows_of(cluster.storage / "job")) == 4
    )
    assert len(cluster.sessions()) == 1
    assert re.search(r"^job: 3 steps on 2 cpu workers", ended.out, re.MULTILINE)
