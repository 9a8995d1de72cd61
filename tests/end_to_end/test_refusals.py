"""What the driver refuses before it starts a Ray: one line, 2, and at once. In this process, but for the clock's tests."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from launching import Ended, Launcher
from omegaconf import OmegaConf

import tp_trainer
from tp_trainer import cli
from tp_trainer.checkpoint.owner import OWNER, Owner
from tp_trainer.checkpoint.store import Store
from tp_trainer.cli.arguments import conf_dir
from tp_trainer.config import ConfigError, load, to_yaml
from tp_trainer.driver import preflight, ray_cluster, training

Call = Callable[..., Ended]


TINY = {
    "model_type": "qwen2", "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
}  # fmt: skip
WENT_ON = 77  # the exit code of what was not refused: the driver went on to Ray


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """main() in this process and an empty directory, up to Ray's start."""

    def ray(*_: Any) -> Any:
        raise SystemExit(WENT_ON)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("sys.argv", ["launch.py"])
    monkeypatch.setattr(ray_cluster, "connected", ray)

    def call(*overrides: str) -> Ended:
        code: Any = 0
        began, used = time.monotonic(), time.process_time()
        capsys.readouterr()
        try:
            cli.main(overrides)
        except SystemExit as end:
            code = end.code
        return Ended(code, *capsys.readouterr(), time.monotonic() - began, time.process_time() - used)

    return call


def refused(ended: Ended, *says: str) -> None:
    assert ended.code == 2, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and ended.out == "", ended
    for each in says:
        assert each in ended.err, ended
    assert ended.cpu_seconds < 5, ended


def fake_checkpoint(run: Path, step: int, **state: Any) -> Path:
    """A checkpoint that counts, with nothing in it but its state."""
    store = Store(str(run))
    values = {"step": step, "global_batch_size": 8, "launch": "x", "epoch": 0, "offset": 0, "tokens": 0, **state}
    store.commit(store.begin(step), step, values, {"tensors": {}}, {})
    return run / f"step_{step:08d}"


def started_run(tmp_path: Path) -> Path:
    """A run that was started with the default choices and has one checkpoint, at step 4."""
    made = fake_checkpoint(tmp_path / "outputs" / "a", 4)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        values = OmegaConf.to_container(compose("config"), resolve=True)
    config = load(values)  # type: ignore[arg-type]
    config.data.tokenizer = "embedded"  # as the driver settles it
    (made.parent / "config.yaml").write_text(to_yaml(config))
    return made


def test_a_good_command_goes_on_to_ray(launch: Call) -> None:
    assert launch().code == WENT_ON


# ------------------------------------------------------------------------------------------------ machine and data


def test_gpu_where_none_is(launch: Call) -> None:
    refused(launch("cluster.device=gpu"), "cluster.device=gpu", "no GPU", "cluster.device=cpu")


def test_gpus_but_too_few(launch: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    refused(launch(), "parallelism=tp2_dp2: needs 4 GPUs, this machine has 2")
    assert launch("cluster.device=cpu").code == WENT_ON
    assert launch("parallelism=tp2_dp1").code == WENT_ON


def test_a_model_that_does_not_fit_the_memory(launch: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_host_memory", lambda: 64 * 2**30)
    refused(launch("model=qwen2_7b", "model.weights=random"), "model.name=Qwen/Qwen2-7B: training on CPU needs about 113 GiB",
            "64 GiB are free")  # fmt: skip


def test_missing_data(launch: Call, tmp_path: Path) -> None:
    refused(launch("data=jsonl", "data.name=nowhere.jsonl"), "data.name=", "nowhere.jsonl: no such file or directory")
    refused(launch("data=text", "data.name=*.txt"), "data.name=", "*.txt: no file matches")
    refused(launch("data=jsonl", f"data.name={tmp_path}"), "no *.jsonl file")


def test_a_text_column_that_is_not_there(launch: Call, tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"body": "x", "title": "y"}\n')
    refused(launch("data=jsonl", "data.name=some.jsonl"), "data.text_column=text: no such column", "body, title")
    assert launch("data=jsonl", "data.name=some.jsonl", "data.text_column=body").code == WENT_ON


def test_a_storage_path_that_can_not_be_written(launch: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(launch("checkpoint.storage_path=file/runs"), f"checkpoint.storage_path={tmp_path}/file/runs: not writable")


def test_a_tracker_that_is_not_installed(launch: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(launch("tracker=wandb"), "tracker=wandb: needs a package", "pip install wandb")


# ----------------------------------------------------------------------------------------------------------- resume


def test_the_global_batch_of_a_resume(launch: Call, tmp_path: Path) -> None:
    fake_checkpoint(tmp_path / "outputs" / "a", 4)
    refused(launch("experiment_name=a", "parallelism=tp1_dp4"), "train.global_batch_size=8: must be a multiple of",
            "4 x 4 = 16", "train.micro_batch_size that works: 1, 2")  # fmt: skip
    assert launch("experiment_name=a", "parallelism=tp1_dp4", "train.micro_batch_size=2").code == WENT_ON
    refused(launch("experiment_name=a", "parallelism=tp1_dp8", "train.micro_batch_size=2"), "train.micro_batch_size that works: 1\n")
    refused(launch("experiment_name=a", "parallelism.dp=3"), "no micro-batch size works")
    refused(launch("experiment_name=a", "train.global_batch_size=16"), "train.global_batch_size=16: this run was started with 8")


def test_a_pinned_checkpoint(launch: Call, tmp_path: Path) -> None:
    pinned = fake_checkpoint(tmp_path / "outputs" / "a", 4)
    assert launch(f"checkpoint.resume={pinned}", "experiment_name=b").code == WENT_ON
    refused(launch("checkpoint.resume=nowhere/step_00000004"), f"checkpoint.resume={tmp_path}/nowhere/step_00000004: unfinished: it has no")
    refused(launch(f"checkpoint.resume={pinned.parent}"), "is no checkpoint: its name is not step_<number>")
    (pinned / "extra").write_text("x")
    (pinned / "state.json").write_text("{}")
    refused(launch(f"checkpoint.resume={pinned}"), "damaged: state.json has 2 bytes")


def test_a_pinned_checkpoint_that_its_run_has_passed(launch: Call, tmp_path: Path) -> None:
    pinned = fake_checkpoint(tmp_path / "outputs" / "a", 4)
    fake_checkpoint(tmp_path / "outputs" / "a", 8)
    refused(launch(f"checkpoint.resume={pinned}", "experiment_name=a"), "a has gone on to step 8; give another experiment_name")


OTHER = {  # what a resume may not change: how it is typed, and the key that is named
    "layers": ("model.overrides.num_hidden_layers=2", "model.architecture.num_hidden_layers=2: ", "with 4"),
    "vocabulary": ("model.overrides.vocab_size=8192", "model.architecture.vocab_size=8192: ", "with 4096"),
    "tokenizer": ("data.tokenizer={tokenizer}", "data.tokenizer={tokenizer}: ", "with embedded"),
    "dataset": ("data=random", "data.source=random: ", "with embedded"),
    "optimizer": ("optim.betas=[0.8,0.9]", "optim.betas=[0.8,0.9]: ", "with [0.9,0.95]"),
    "sequence length": ("data.seq_length=64", "data.seq_length=64: ", "with 128"),
}


@pytest.mark.parametrize("how", ["auto", "pinned"])
@pytest.mark.parametrize(("typed", "named", "before"), OTHER.values(), ids=list(OTHER))
def test_a_resume_of_another_run(how: str, typed: str, named: str, before: str, launch: Call, tmp_path: Path) -> None:
    pinned, tokenizer = started_run(tmp_path), tmp_path / "tokenizer"
    shutil.copytree(Path(tp_trainer.__file__).parent / "assets" / "tokenizer", tokenizer)
    typed, named = (each.format(tokenizer=tokenizer) for each in (typed, named))
    resume = ("experiment_name=a",) if how == "auto" else ("experiment_name=b", f"checkpoint.resume={pinned}")
    refused(launch(*resume, typed), f"error: {named}the run in {pinned.parent} was started {before}; ", "checkpoint.allow_mismatch=[")
    key = named.partition("=")[0]
    assert launch(*resume, typed, f"checkpoint.allow_mismatch=[{key}]").code == (2 if key == "data.source" else WENT_ON)
    assert launch(*resume, typed, f"checkpoint.allow_mismatch=[{key.rpartition('.')[0]}]").code == WENT_ON


def test_every_field_that_differs_is_named(launch: Call, tmp_path: Path) -> None:
    pinned = started_run(tmp_path)
    other = ("experiment_name=a", "optim.lr=1e-4", "optim.weight_decay=0", "data.shuffle=false")
    refused(launch(*other), "data.shuffle=false: the run in", "was started with true; optim.lr=0.0001: with 0.003; "
            "optim.weight_decay=0.0: with 0.1; ", "checkpoint.allow_mismatch=[data.shuffle,optim.lr,optim.weight_decay]")  # fmt: skip
    refused(launch(*other, "checkpoint.allow_mismatch=[optim]"), "error: data.shuffle=false: ", "mismatch=[data.shuffle]\n")
    assert launch(*other, "checkpoint.allow_mismatch=[optim,data.shuffle]").code == WENT_ON
    assert pinned.is_dir()


def test_what_may_always_change(launch: Call, tmp_path: Path) -> None:
    started_run(tmp_path)
    changes = ("train.max_steps=9", "train.log_interval=3", "checkpoint.interval=7", "parallelism=tp1_dp1", "tracker=none",
               "cluster.max_failures=9", "train.micro_batch_size=2")  # fmt: skip
    assert launch("experiment_name=a", *changes).code == WENT_ON


def test_a_mismatch_that_nothing_compares(launch: Call) -> None:
    refused(launch("checkpoint.allow_mismatch=[optim.lrr]"), "checkpoint.allow_mismatch=[optim.lrr]: ", "did you mean optim.lr?")
    refused(launch("checkpoint.allow_mismatch=[cluster.device]"), "checkpoint.allow_mismatch=[cluster.device]: no resume compares that")


def test_never_keeps_the_old_run_aside(launch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_checkpoint(tmp_path / "outputs" / "a", 4)
    monkeypatch.setattr(ray_cluster, "connected", lambda *_: nullcontext())

    def too_small(_: Any) -> None:
        raise ConfigError("parallelism", "tp2_dp2", "needs more")

    monkeypatch.setattr(ray_cluster, "check_capacity", too_small)
    refused(launch("experiment_name=a", "checkpoint.resume=never"), "needs more")
    assert (tmp_path / "outputs" / "a" / "step_00000004" / "manifest.json").is_file()  # what can't start moves nothing

    def fit(*_: Any) -> None:
        raise SystemExit(WENT_ON)

    monkeypatch.setattr(ray_cluster, "check_capacity", lambda _: None)
    monkeypatch.setattr(training, "_fit", fit)
    ended = launch("experiment_name=a", "checkpoint.resume=never")
    assert ended.code == WENT_ON
    (kept,) = (tmp_path / "outputs").glob("a.before-*")
    assert (kept / "step_00000004" / "manifest.json").is_file() and str(kept) in ended.out
    assert not list((tmp_path / "outputs" / "a").glob("step_*"))


def test_a_damaged_checkpoint_is_passed_over(launch: Call, tmp_path: Path) -> None:
    fake_checkpoint(tmp_path / "outputs" / "a", 4)
    newer = fake_checkpoint(tmp_path / "outputs" / "a", 8, global_batch_size=16)
    (newer / "state.json").write_text("")
    refused(launch("experiment_name=a", "parallelism=tp1_dp4"), "train.global_batch_size=8: ")


# ------------------------------------------------------------------------------------------------------- one writer


def test_a_second_run_of_the_same_name(launch: Call, tmp_path: Path) -> None:
    owner = Owner(Store(str(tmp_path / "outputs" / "a")), "first")
    owner.claim("experiment_name", "a")
    ended = launch("experiment_name=a")
    refused(ended, f"experiment_name=a: is being trained by process {os.getpid()} on {socket.gethostname()}, since 2")
    assert ended.seconds < 5
    owner.release()
    assert launch("experiment_name=a").code == WENT_ON
    assert not (tmp_path / "outputs" / "a" / OWNER).exists(), "given back, however it ends"


def test_a_dead_owner_is_named_and_followed(launch: Call, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "outputs" / "a"))
    store.write_json(OWNER, {**Owner(store, "old").record, "started": "1", "heartbeat": time.time()})
    ended = launch("experiment_name=a")
    assert ended.code == WENT_ON and f"taking over from process {os.getpid()} on" in ended.out


# ------------------------------------------------------------------------------------------------ as from the shell


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("cluster.device=gpu",), "no GPU"),
        (("model=qwen2_7b", "model.weights=random", "model.overrides.num_hidden_layers=9999"), "16 bytes a parameter"),
        (("data=jsonl", "data.name=nowhere.jsonl"), "no such file"),
        (("checkpoint.storage_path=/dev/null/runs",), "not writable"),
    ],
    ids=["gpu", "memory", "data", "storage"],
)
def test_from_the_shell_within_five_seconds(overrides: tuple[str, ...], says: str, launcher: Launcher) -> None:
    ended = launcher.run(*overrides)
    refused(ended, says)
    assert not launcher.sessions() and not list(launcher.cwd.iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere.invalid:6379", "127.0.0.1:x"])
def test_a_cluster_that_does_not_answer(address: str, launcher: Launcher) -> None:
    """Ray would try for minutes."""
    ended = launcher.run("cluster=ray", f"cluster.address={address}", "tracker=none")
    refused(ended, f"error: cluster.address={address}: no Ray cluster answers there")


def test_a_cluster_that_wants_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ray start` makes it by itself from Ray 2.60 on; what Ray raises then was seen there."""

    def init(**_: Any) -> None:
        cause = "Failed to connect to GCS. Last connection error: ... ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: ..."
        raise ConnectionError("Failed to connect to Ray cluster at 192.0.2.2:6379") from RuntimeError(cause)

    monkeypatch.setattr("ray.init", init)
    config = load({"cluster": {"kind": "ray"}, "model": {"name": None, "architecture": TINY}})
    with pytest.raises(ConfigError, match="address=auto: wants a token: set RAY_AUTH_MODE"), ray_cluster.connected(config.cluster, 4):
        pass


def test_no_cluster_to_be_found(launcher: Launcher) -> None:
    refused(launcher.run("cluster=ray", "tracker=none"), "error: cluster.address=auto: no Ray cluster answers there")
