"""job.yaml, read by Anyscale's own reader, offline, and what that doesn't look at: GPUs against
workers, paths, retries.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from packaging.requirements import Requirement

from tp_trainer.config import Config, Settings, load

models = pytest.importorskip("anyscale.job.models", reason="pip install -e '.[test]'")

ROOT = Path(__file__).resolve().parent.parent
GPUS = {
    "p4d.24xlarge": 8,
    "p4de.24xlarge": 8,
    "p5.48xlarge": 8,
    "p5e.48xlarge": 8,
    "p5en.48xlarge": 8,
}
"""Instance type -> its GPUs, from AWS's own tables."""


@pytest.fixture(scope="module")
def job() -> Any:
    return models.JobConfig.from_yaml(str(ROOT / "job.yaml"))


@pytest.fixture
def config(job: Any, monkeypatch: pytest.MonkeyPatch) -> Config:
    """What the entrypoint composes to on the cluster."""
    for key, value in {
        "ANYSCALE_ARTIFACT_STORAGE": "s3://bucket/org/cloud/artifacts",
        **job.env_vars,
    }.items():
        monkeypatch.setenv(key, value)
    python, script, *overrides = shlex.split(job.entrypoint)
    assert (python, script) == ("python", "launch.py")
    ConfigStore.instance().store(name="schema", node=Settings)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        values = OmegaConf.to_container(compose("config", overrides), resolve=True)
    assert isinstance(values, dict)
    return load({str(key): value for key, value in values.items()})


def dependencies() -> list[Requirement]:
    return [
        Requirement(line)
        for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ]


def test_worker_gpus_are_the_world(job: Any, config: Config) -> None:
    groups = job.compute_config.worker_nodes
    world, tp = config.parallelism.world_size, config.parallelism.tp
    assert sum(GPUS[group.instance_type] * group.min_nodes for group in groups) == world
    assert sum(GPUS[group.instance_type] * group.max_nodes for group in groups) == world, (
        "the rest would be paid for and idle"
    )
    assert all(GPUS[group.instance_type] % tp == 0 for group in groups), (
        "a tp group stays within a node"
    )
    assert job.compute_config.head_node.instance_type not in GPUS


def test_a_retry_goes_on(job: Any, config: Config) -> None:
    assert job.max_retries and job.max_retries > 0
    assert "experiment_name=" in job.entrypoint and config.checkpoint.resume == "auto"
    assert config.cluster.kind == "anyscale"
    assert config.run_dir.startswith("s3://bucket/org/cloud/artifacts/"), "must outlive the cluster"


def test_what_the_job_needs_is_uploaded(job: Any) -> None:
    assert (ROOT / job.working_dir).resolve() == ROOT
    for name in ["launch.py", "tp_trainer", "conf"]:
        assert (ROOT / name).exists()
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in job.excludes)


def test_image_and_requirements_are_what_the_package_needs(job: Any) -> None:
    needed = {each.name: each.specifier for each in dependencies()}
    found = re.fullmatch(r"anyscale/ray:([0-9.]+)-py3(\d+)-cu(\d+)", job.image_uri)
    assert found and found[1] in needed.pop("ray") and int(found[2]) >= 11
    stated = {(each := Requirement(line)).name: each.specifier for line in job.requirements}
    assert "s3fs" in stated  # $ANYSCALE_ARTIFACT_STORAGE is a bucket
    assert {name: specifier for name, specifier in stated.items() if name != "s3fs"} == needed


def test_the_image_is_one_that_anyscale_lists(job: Any) -> None:
    enum = pytest.importorskip(
        "anyscale.client.openapi_client.models.supportedbaseimagesenum"
    ).SUPPORTEDBASEIMAGESENUM
    assert job.image_uri in enum.allowable_values


def test_no_secret_in_the_file(job: Any) -> None:
    assert not [
        key
        for key in job.env_vars
        if re.search("TOKEN|KEY|SECRET|PASSWORD", key) and key != "TOKENIZERS_PARALLELISM"
    ]
