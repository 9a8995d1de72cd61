"""What the driver refuses before it starts a Ray: one line, 2, and at once. In this process, but
for the clock's tests.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from launching import Ended, Launcher
from omegaconf import OmegaConf

import tp_trainer
from tp_trainer import cli
from tp_trainer.checkpoint.owner import OWNER, Owner
from tp_trainer.checkpoint.state import RunState
from tp_trainer.checkpoint.store import DRAFT, Store
from tp_trainer.cli.arguments import conf_dir
from tp_trainer.config import ConfigError, load, to_yaml
from tp_trainer.driver import preflight, ray_cluster, training

Call = Callable[..., Ended]


TINY = {
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
WENT_ON = 77  # the exit code of what was not refused: the driver went on to Ray


@pytest.fixture
def launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
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
        return Ended(
            code, *capsys.readouterr(), time.monotonic() - began, time.process_time() - used
        )

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
    values = {
        "global_batch_size": 8,
        "launch": "x",
        "epoch": 0,
        "offset": 0,
        "tokens": 0,
        **state,
    }
    store.commit(store.begin(step), RunState(step, **values), b"{}", {})
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


# ------------------------------------------------------------------------------------------------ m


def test_gpu_where_none_is(launch: Call) -> None:
    refused(launch("cluster.device=gpu"), "cluster.device=gpu", "no GPU", "cluster.device=cpu")


def test_gpus_but_too_few(launch: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    refused(launch(), "parallelism=tp2_dp2: needs 4 GPUs, this machine has 2")
    assert launch("cluster.device=cpu").code == WENT_ON
    assert launch("parallelism=tp2_dp1").code == WENT_ON


def test_a_model_that_does_not_fit_the_memory(
    launch: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "free_host_memory", lambda: 64 * 2**30)
    refused(
        launch("model=qwen2_7b", "model.weights=random"),
        "model.name=Qwen/Qwen2-7B: training on CPU needs about 113 GiB",
        "64 GiB are free",
    )


def test_missing_data(launch: Call, tmp_path: Path) -> None:
    refused(
        launch("data=jsonl", "data.name=nowhere.jsonl"),
        "data.name=",
        "nowhere.jsonl: no such file or directory",
    )
    refused(launch("data=text", "data.name=*.txt"), "data.name=", "*.txt: no file matches")
    refused(launch("data=jsonl", f"data.name={tmp_path}"), "no *.jsonl file")


def test_a_name_against_its_group(launch: Call, tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "some.txt").write_text("x\n")
    for typed in ([], ["dry_run=true"], ["task=bench"]):
        refused(launch("data.name=/nope.jsonl", *typed), "data.name=/nope.jsonl: no such file")
        refused(launch("data=moby_dick", "data.name=/nope.jsonl", *typed), "type data=jsonl")
        refused(launch("data=text", "data.name=some.jsonl", *typed), "type data=jsonl")
        refused(launch("data=wikitext", "data.name=some.txt", *typed), "type data=text")
        refused(launch("data=random", "data.name=some.txt", *typed), "type data=text")
    refused(launch("data=jsonl", "data.name=some.txt"), "type data=text")
    refused(launch("data.name=some.txt", "data.split=test"), "data.split=test: data.source=text")
    refused(launch("data.name=[some.txt]"), "data.name=[some.txt]: must be one value, not a list")
    assert launch("data.name=some.jsonl").code == launch("data.name=some.txt").code == WENT_ON
    assert launch("data=random", "data.name=null").code == WENT_ON


def test_weights_without_a_tokenizer(launch: Call, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "model" / "model.safetensors").write_text("x")
    refused(
        launch("model.name=model"), "data.tokenizer: ", "holds no tokenizer; give data.tokenizer="
    )
    typed = ("model.name=model", "data.tokenizer=embedded")
    assert launch(*typed).code == launch("model.name=model", "model.weights=random").code == WENT_ON


def test_a_directory_that_datasets_reads(launch: Call, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("body,number\none whale,1\ntwo whales,2\n")
    refused(launch("data.name=set"), "data.text_column=text: no such column", "body, number")
    good = ("data.name=set", "data.text_column=body")
    refused(launch(*good, "data.split=test"), "data.split=test: ")
    refused(launch(*good, "data.validation_split=test"), "data.validation_split=test: ")
    assert launch(*good).code == WENT_ON


def test_a_text_column_that_is_not_there(launch: Call, tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text('{"body": "x", "title": "y"}\n')
    refused(
        launch("data=jsonl", "data.name=some.jsonl"),
        "data.text_column=text: no such column",
        "body, title",
    )
    assert launch("data=jsonl", "data.name=some.jsonl", "data.text_column=body").code == WENT_ON


def test_a_storage_path_that_can_not_be_written(launch: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(
        launch("checkpoint.storage_path=file/runs"),
        f"checkpoint.storage_path={tmp_path}/file/runs: not writable",
    )


def test_a_tracker_that_is_not_installed(launch: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(launch("tracker=wandb"), "tracker=wandb: needs a package", "pip install wandb")


# --------------------------------------------------------------------------------------------------


def test_the_global_batch_of_a_resume(launch: Call, tmp_path: Path) -> None:
    fake_checkpoint(tmp_path / "outputs" / "a", 4)
    refused(
        launch("experiment_name=a", "parallelism=tp1_dp4"),
        "train.global_batch_size=8: must be a multiple of",
        "4 x 4 = 16",
        "train.micro_batch_size that works: 1, 2",
    )
    assert (
        launch("experiment_name=a", "parallelism=tp1_dp4", "train.micro_batch_size=2").code
        == WENT_ON
    )
    refused(
        launch("experiment_name=a", "parallelism=tp1_dp8", "train.micro_batch_size=2"),
        "train.micro_batch_size that works: 1\n",
    )
    refused(launch("experiment_name=a", "parallelism.dp=3"), "no micro-batch size works")
    refused(
        launch("experiment_name=a", "train.global_batch_size=16"),
        "train.global_batch_size=16: this run was started with 8",
    )


def test_a_pinned_checkpoint(launch: Call, tmp_path: Path) -> None:
    pinned = fake_checkpoint(tmp_path / "outputs" / "a", 4)
    assert launch(f"checkpoint.resume={pinned}", "experiment_name=b").code == WENT_ON
    refused(
        launch("checkpoint.resume=nowhere/step_00000004"),
        f"checkpoint.resume={tmp_path}/nowhere/step_00000004: is not there",
    )
    refused(
        launch(f"checkpoint.resume={pinned.parent}/step_00000005"),
        f"step_00000005: is not there; the newest there is {pinned}",
    )
    refused(
        launch(f"checkpoint.resume={pinned.parent}"),
        "is no checkpoint: its name is not step_<number>; ",
        f"give one of its checkpoints, e.g. {pinned}\n",
    )
    (pinned / "extra").write_text("x")
    (pinned / "state.json").write_text("{}")
    refused(launch(f"checkpoint.resume={pinned}"), "damaged: state.json has 2 bytes")


def test_a_pinned_checkpoint_that_its_run_has_passed(launch: Call, tmp_path: Path) -> None:
    pinned = fake_checkpoint(tmp_path / "outputs" / "a", 4)
    fake_checkpoint(tmp_path / "outputs" / "a", 8)
    refused(
        launch(f"checkpoint.resume={pinned}", "experiment_name=a"),
        "a has gone on to step 8; give another experiment_name",
    )


OTHER = {  # what a resume may not change: how it is typed, and the key that is named
    "layers": (
        "model.overrides.num_hidden_layers=2",
        "model.architecture.num_hidden_layers=2: ",
        "with 4",
    ),
    "vocabulary": (
        "model.overrides.vocab_size=8192",
        "model.architecture.vocab_size=8192: ",
        "with 4096",
    ),
    "tokenizer": ("data.tokenizer={tokenizer}", "data.tokenizer={tokenizer}: ", "with embedded"),
    "dataset": ("data=random", "data.source=random: ", "with embedded"),
    "optimizer": ("optim.betas=[0.8,0.9]", "optim.betas=[0.8,0.9]: ", "with [0.9,0.95]"),
    "precision": (
        "parallelism.param_dtype=bfloat16",
        "parallelism.param_dtype=bfloat16: ",
        "with null",
    ),
    "float8": ("parallelism.float8=true", "parallelism.float8=true: ", "with false"),
    "sequence length": ("data.seq_length=64", "data.seq_length=64: ", "with 128"),
}


@pytest.mark.parametrize("how", ["auto", "pinned"])
@pytest.mark.parametrize(("typed", "named", "before"), OTHER.values(), ids=list(OTHER))
def test_a_resume_of_another_run(
    how: str, typed: str, named: str, before: str, launch: Call, tmp_path: Path
) -> None:
    pinned, tokenizer = started_run(tmp_path), tmp_path / "tokenizer"
    shutil.copytree(Path(tp_trainer.__file__).parent / "assets" / "tokenizer", tokenizer)
    typed, named = (each.format(tokenizer=tokenizer) for each in (typed, named))
    resume = (
        ("experiment_name=a",)
        if how == "auto"
        else ("experiment_name=b", f"checkpoint.resume={pinned}")
    )
    refused(
        launch(*resume, typed),
        f"error: {named}the run in {pinned.parent} was started {before}; ",
        "checkpoint.allow_mismatch=[",
    )
    key = named.partition("=")[0]
    assert launch(*resume, typed, f"checkpoint.allow_mismatch=[{key}]").code == (
        2 if key == "data.source" else WENT_ON
    )
    assert (
        launch(*resume, typed, f"checkpoint.allow_mismatch=[{key.rpartition('.')[0]}]").code
        == WENT_ON
    )


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("data.name", {"data": {"source": "jsonl", "name": "/nowhere/at/all"}}),
        ("data.tokenizer", {"data": {"tokenizer": "/nowhere/at/all"}}),
        (
            "model.name",
            {
                "model": {
                    "name": "/nowhere/at/all",
                    "architecture": {**TINY, "_name_or_path": "/nowhere/at/all"},
                }
            },
        ),
        (
            "model.name",
            {
                "model": {
                    "name": "/nowhere/at/all",
                    "architecture": {**TINY, "_name_or_path": "/nowhere/at/all"},
                    "weights": "random",
                }
            },
        ),
    ],
)
def test_paths_of_a_saved_config_that_are_gone(
    key: str, values: dict[str, Any], launch: Call, tmp_path: Path
) -> None:
    config = load(
        {
            "model": {"architecture": TINY},
            "experiment_name": "a",
            "checkpoint": {"storage_path": str(tmp_path)},
            **values,
        }
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text(to_yaml(config))
    refused(launch("--config-path", "a"), f"error: {key}=/nowhere/at/all: no such ")


def run_on_a_file(tmp_path: Path, launch: Call, monkeypatch: pytest.MonkeyPatch, name: str) -> Path:
    """A run on `old/corpus.jsonl` with a checkpoint, under the name that its path gave it."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "corpus.jsonl").write_text('{"text": "x"}\n')
    prepared = list[Any]()

    def prepare(config: Any) -> Any:
        prepared.append(config)
        return preflight.prepare(config)

    with monkeypatch.context() as patch:
        patch.setattr(training, "prepare", prepare)
        assert launch("data.name=old/corpus.jsonl", f"experiment_name={name}").code == WENT_ON
    run = Path(prepared[0].run_dir)
    fake_checkpoint(run, 4)
    (run / "config.yaml").write_text(to_yaml(prepared[0]))
    return run


def test_a_run_whose_paths_have_changed(
    launch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies there decides: gone, or of the same sizes, it may be the same; the tokens tell."""
    run_on_a_file(tmp_path, launch, monkeypatch, "a")
    shutil.copytree(tmp_path / "old", tmp_path / "copy")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    for moved in ("copy", "link"):
        assert launch(f"data.name={moved}/corpus.jsonl", "experiment_name=a").code == WENT_ON
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "corpus.jsonl").write_text('{"text": "another"}\n')
    other = ("data.name=other/corpus.jsonl", "experiment_name=a")
    refused(launch(*other), f"data.name={tmp_path}/other/corpus.jsonl: the run in ")
    shutil.rmtree(tmp_path / "old")
    assert launch(*other).code == WENT_ON


@pytest.mark.parametrize("how", ["moved", "spelled otherwise"])
def test_a_run_that_differs_in_paths_alone_is_named(
    how: str, launch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a project that was moved, and as names were derived before paths were canonical."""
    run = run_on_a_file(tmp_path, launch, monkeypatch, "null")
    if how == "moved":
        (tmp_path / "old").rename(tmp_path / "new")
        where = "new"
    else:
        run = run.rename(f"{str(run)[:-8]}00000000")
        where = "old"
    ended = launch(f"data.name={where}/corpus.jsonl")
    spelled = f"data.name={tmp_path}/old/corpus.jsonl" if how == "moved" else how
    said = f"{run} holds a run that differs from this one in paths alone ({spelled}); to go on"
    assert ended.code == WENT_ON
    assert f"{said} with it: experiment_name={run.name}\n" in ended.out, ended
    named = (f"data.name={where}/corpus.jsonl", f"experiment_name={run.name}")
    assert launch(*named).code == WENT_ON
    for other in ("optim.lr=1e-4", "parallelism.sequence_parallel=false", "seed=7"):
        assert "in paths alone" not in launch(f"data.name={where}/corpus.jsonl", other).out


def test_every_field_that_differs_is_named(launch: Call, tmp_path: Path) -> None:
    pinned = started_run(tmp_path)
    other = ("experiment_name=a", "optim.lr=1e-4", "optim.weight_decay=0", "data.shuffle=false")
    refused(
        launch(*other),
        "data.shuffle=false: the run in",
        "was started with true; optim.lr=0.0001: with 0.003; optim.weight_decay=0.0: with 0.1; ",
        "checkpoint.allow_mismatch=[data.shuffle,optim.lr,optim.weight_decay]",
    )
    refused(
        launch(*other, "checkpoint.allow_mismatch=[optim]"),
        "error: data.shuffle=false: ",
        "mismatch=[data.shuffle]\n",
    )
    assert launch(*other, "checkpoint.allow_mismatch=[optim,data.shuffle]").code == WENT_ON
    assert pinned.is_dir()


def test_what_may_always_change(launch: Call, tmp_path: Path) -> None:
    started_run(tmp_path)
    changes = (
        "train.max_steps=9",
        "train.log_interval=3",
        "checkpoint.interval=7",
        "parallelism=tp1_dp1",
        "tracker=none",
        "cluster.max_failures=9",
        "train.micro_batch_size=2",
    )
    assert launch("experiment_name=a", *changes).code == WENT_ON


def test_a_mismatch_that_nothing_compares(launch: Call) -> None:
    refused(
        launch("checkpoint.allow_mismatch=[optim.lrr]"),
        "checkpoint.allow_mismatch=[optim.lrr]: ",
        "did you mean optim.lr?",
    )
    refused(
        launch("checkpoint.allow_mismatch=[cluster.device]"),
        "checkpoint.allow_mismatch=[cluster.device]: no resume compares that",
    )


def test_never_keeps_the_old_run_aside(
    launch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_checkpoint(tmp_path / "outputs" / "a", 4)
    monkeypatch.setattr(ray_cluster, "connected", lambda *_: nullcontext())

    def too_small(_: Any) -> None:
        raise ConfigError("parallelism", "tp2_dp2", "needs more")

    monkeypatch.setattr(ray_cluster, "check_capacity", too_small)
    refused(launch("experiment_name=a", "checkpoint.resume=never"), "needs more")
    # what can't start moves nothing
    assert (tmp_path / "outputs" / "a" / "step_00000004" / "manifest.json").is_file()

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


def link_instead(made: Path) -> None:
    elsewhere = made.parent.parent / "elsewhere"
    made.rename(elsewhere)
    made.symlink_to(elsewhere)


def nothing_instead(made: Path, then: Callable[[], Any]) -> None:
    shutil.rmtree(made)
    then()


# what happened to the only one, and what is said
LOST: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is short": (
        lambda made: (made / "state.json").write_text("{}"),
        "(damaged: state.json has 2",
    ),
    "no manifest": (
        lambda made: Path.unlink(made / "manifest.json"),
        "(unfinished: it has no manifest)",
    ),
    "empty": (lambda made: nothing_instead(made, made.mkdir), "(unfinished: it has no manifest)"),
    "a file": (
        lambda made: nothing_instead(made, made.touch),
        "(damaged: it is a file, not a directory)",
    ),
    "a link": (link_instead, "symbolic link"),
    "a dangling link": (
        lambda made: nothing_instead(made, lambda: made.symlink_to("no")),
        "symbolic link",
    ),
    "another name": (
        lambda made: made.rename(made.with_name("step_4")),
        "step_4 (its name is not step_",
    ),
    "a copy": (lambda made: made.rename(f"{made}.bak"), "step_00000004.bak (its name is not step_"),
}


@pytest.mark.parametrize(("lose", "says"), LOST.values(), ids=list(LOST))
def test_checkpoints_of_which_none_counts(
    lose: Callable[[Path], object],
    says: str,
    launch: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lose(fake_checkpoint(tmp_path / "outputs" / "a", 4))
    before = sorted(os.listdir(tmp_path / "outputs" / "a"))
    refused(
        launch("experiment_name=a"),
        f"checkpoint.resume=auto: {tmp_path}/outputs/a holds checkpoints, and none of them"
        " counts: ",
        says,
        "give checkpoint.resume=never, which keeps what is there under another name\n",
    )
    assert sorted(os.listdir(tmp_path / "outputs" / "a")) == before

    def fit(*_: Any) -> None:
        raise SystemExit(WENT_ON)

    monkeypatch.setattr(ray_cluster, "connected", lambda *_: nullcontext())
    monkeypatch.setattr(ray_cluster, "check_capacity", lambda _: None)
    monkeypatch.setattr(training, "_fit", fit)
    assert launch("experiment_name=a", "checkpoint.resume=never").code == WENT_ON
    (kept,) = (tmp_path / "outputs").glob("a.before-*")
    assert set(before) <= set(os.listdir(kept)), "nothing is lost"


def test_each_one_that_does_not_count_is_named(launch: Call, tmp_path: Path) -> None:
    for step in (4, 8):
        (fake_checkpoint(tmp_path / "outputs" / "a", step) / "metadata.json").unlink()
    refused(
        launch("experiment_name=a"),
        "step_00000008 (damaged: metadata.json is missing); step_00000004 (damaged: metadata.json",
    )


def test_what_a_killed_first_save_leaves_is_no_checkpoint(launch: Call, tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "a"
    made = fake_checkpoint(run, 4)
    made.rename(run / f"{DRAFT}step_00000004-0123abcd")
    assert launch("experiment_name=a").code == WENT_ON
    store = Store(f"memory://{tmp_path}/a")
    # on an object store it stands under its own name
    store.write_text("step_00000004/00000_0000.distcp", "x")
    place = ("experiment_name=a", f"checkpoint.storage_path=memory://{tmp_path}", "tracker=none")
    assert launch(*place).code == WENT_ON
    store.write_text("step_00000008/manifest.json", "x")
    refused(
        launch(*place), "step_00000008 (damaged: manifest.json", "give another experiment_name\n"
    )


def test_a_directory_that_can_not_be_looked_into(
    launch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "outputs" / "a"
    run.parent.mkdir()
    run.write_text("")
    refused(
        launch("experiment_name=a"),
        f"whether {run} holds checkpoints can't be told",
        "Not a directory",
    )
    run.unlink()
    run.symlink_to("nowhere")
    refused(
        launch("experiment_name=a"),
        f"whether {run} holds checkpoints can't be told",
        "No such file",
    )
    run.unlink()
    made = fake_checkpoint(run, 4)

    def forbid(name: str, place: Path) -> None:
        real = getattr(os, name)

        def look(path: Any) -> Any:
            if str(path) == str(place):
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(os, name, look)

    forbid("scandir", made)
    refused(
        launch("experiment_name=a"),
        "step_00000004 (it can't be looked at (PermissionError",
        "Permission denied",
    )
    forbid("listdir", run)
    refused(launch("experiment_name=a"), "holds checkpoints can't be told", "Permission denied")


@pytest.mark.parametrize("content", ["", "model: [", "model: 3\n", "- 1\n", "\0", "a: b\n"])
def test_a_config_that_says_nothing_beside_checkpoints(
    content: str, launch: Call, tmp_path: Path
) -> None:
    made = started_run(tmp_path)
    (made.parent / "config.yaml").write_text(content)
    for resume in (("experiment_name=a",), ("experiment_name=b", f"checkpoint.resume={made}")):
        refused(
            launch(*resume),
            f"{made.parent}/config.yaml can't be read (",
            "it says what this run is; mend it, or move it away",
        )
    (made.parent / "config.yaml").unlink()
    ended = launch("experiment_name=a")
    assert (
        ended.code == WENT_ON
        and "has no config.yaml: whether its checkpoints are of the same run can't be told"
        in ended.out
    )


def test_what_is_passed_over_is_said(launch: Call, tmp_path: Path) -> None:
    made = started_run(tmp_path)
    fake_checkpoint(made.parent, 12).rename(made.parent / "step_12")
    ended = launch("experiment_name=a")
    assert ended.code == WENT_ON, ended
    assert "passed over: step_12 (its name is" in ended.out


def test_fewer_steps_than_the_run_has_done(launch: Call, tmp_path: Path) -> None:
    started_run(tmp_path)
    refused(
        launch("experiment_name=a", "train.max_steps=3"),
        "train.max_steps=3: the run is at step 4 already; give at least that",
    )
    assert launch("experiment_name=a", "train.max_steps=4").code == WENT_ON


def test_the_command_of_a_pinned_start_goes_on(launch: Call, tmp_path: Path) -> None:
    pinned = started_run(tmp_path)
    own = fake_checkpoint(tmp_path / "outputs" / "b", 6)
    refused(
        launch("experiment_name=b", f"checkpoint.resume={pinned}"),
        "b holds another run's step_00000006; give another",
    )
    text = (pinned.parent / "config.yaml").read_text()
    (own.parent / "config.yaml").write_text(text.replace("resume: auto", f"resume: {pinned}"))
    ended = launch("experiment_name=b", f"checkpoint.resume={pinned}")
    assert (
        ended.code == WENT_ON
        and "this run was started from it, and goes on from its own step 6" in ended.out
    )
    refused(
        launch("experiment_name=b", f"checkpoint.resume={pinned}", "optim.lr=1"),
        "was started with 0.003",
    )
    shutil.rmtree(own)
    assert launch("experiment_name=b", f"checkpoint.resume={pinned}").code == WENT_ON


def test_a_run_stays_begun_from_where_it_was(tmp_path: Path) -> None:
    """Whatever `checkpoint.resume` was in between; its own checkpoints begin nothing."""
    first = str(tmp_path / "a" / "step_00000004")
    config = load(
        {
            "experiment_name": "b",
            "model": {"architecture": TINY},
            "checkpoint": {"storage_path": str(tmp_path), "resume": first},
        }
    )
    store = Store(config.run_dir)

    def start(resume: str) -> str | None:
        config.checkpoint.resume = resume
        config.checkpoint.resume = preflight.to_record(config, store)
        store.write_text("config.yaml", to_yaml(config))
        return preflight.begun_from(store)

    assert start(first + "/") == first
    own = fake_checkpoint(tmp_path / "b", 6)
    assert [start(each) for each in ("auto", str(own), first)] == [first] * 3
    store.remove("config.yaml")
    assert start("auto") == "auto" and start(str(own)) == "auto"
    shutil.rmtree(own)
    assert start(first) == first


def test_an_own_older_checkpoint_of_a_pinned_start(launch: Call, tmp_path: Path) -> None:
    pinned = started_run(tmp_path)
    for step in (6, 8):
        own = fake_checkpoint(tmp_path / "outputs" / "b", step)
    text = (pinned.parent / "config.yaml").read_text()
    (own.parent / "config.yaml").write_text(text.replace("resume: auto", f"resume: {pinned}"))
    refused(
        launch("experiment_name=b", f"checkpoint.resume={own.parent}/step_00000006"),
        "b has gone on to step 8; give another",
    )
    another = fake_checkpoint(pinned.parent, 5)
    refused(
        launch("experiment_name=b", f"checkpoint.resume={another}"),
        "b holds another run's step_00000008",
    )
    for each in own.parent.glob("step_*"):
        (each / "state.json").write_text("{}")
    refused(
        launch("experiment_name=b", f"checkpoint.resume={pinned}"),
        "holds checkpoints, and none of them counts: step_00000008 (damaged",
    )


def test_a_finished_run_of_other_choices(launch: Call, tmp_path: Path) -> None:
    """Its checkpoints have been removed; what it was stands in its config."""
    made = started_run(tmp_path)
    shutil.rmtree(made)
    length = {"num_epochs": 1, "max_steps_per_epoch": None, "max_steps": None}
    Store(str(made.parent)).write_json("summary.json", {"status": "finished", "run_length": length})
    assert "this run has finished" in launch("experiment_name=a").out
    refused(launch("experiment_name=a", "optim.lr=1"), "optim.lr=1.0: the run in")


# --------------------------------------------------------------------------------------------------


def test_a_second_run_of_the_same_name(launch: Call, tmp_path: Path) -> None:
    owner = Owner(Store(str(tmp_path / "outputs" / "a")), "first")
    owner.claim("experiment_name", "a")
    ended = launch("experiment_name=a")
    refused(
        ended,
        f"experiment_name=a: is being trained by process {os.getpid()} on {socket.gethostname()},"
        " since 2",
    )
    owner.release()
    assert launch("experiment_name=a").code == WENT_ON
    assert not (tmp_path / "outputs" / "a" / OWNER).exists(), "given back, however it ends"


def test_a_dead_owner_is_named_and_followed(launch: Call, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "outputs" / "a"))
    store.write_json(
        OWNER, {**Owner(store, "old").record, "started": "1", "heartbeat": time.time()}
    )
    ended = launch("experiment_name=a")
    assert ended.code == WENT_ON and f"taking over from process {os.getpid()} on" in ended.out


# ------------------------------------------------------------------------------------------------ a


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("cluster.device=gpu",), "no GPU"),
        (
            ("model=qwen2_7b", "model.weights=random", "model.overrides.num_hidden_layers=9999"),
            "16 bytes a parameter",
        ),
        (("data=jsonl", "data.name=nowhere.jsonl"), "no such file"),
        (("checkpoint.storage_path=/dev/null/runs",), "not writable"),
    ],
    ids=["gpu", "memory", "data", "storage"],
)
def test_from_the_shell_within_five_seconds(
    overrides: tuple[str, ...], says: str, launcher: Launcher
) -> None:
    ended = launcher.run(*overrides)
    refused(ended, says)
    assert not launcher.sessions() and not list(launcher.cwd.iterdir())


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere.invalid:6379", "127.0.0.1:x"]
)
def test_a_cluster_that_does_not_answer(address: str, launcher: Launcher) -> None:
    """Ray would try for minutes."""
    ended = launcher.run("cluster=ray", f"cluster.address={address}", "tracker=none")
    refused(ended, f"error: cluster.address={address}: no Ray cluster answers there")


@pytest.mark.usefixtures("without_ray")
def test_a_cluster_that_wants_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ray start` makes it by itself from Ray 2.60 on; what Ray raises then was seen there."""

    def init(**_: Any) -> None:
        cause = (
            "Failed to connect to GCS. Last connection error: ..."
            " ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: ..."
        )
        raise ConnectionError(
            "Failed to connect to Ray cluster at 192.0.2.2:6379"
        ) from RuntimeError(cause)

    monkeypatch.setattr("ray.init", init)
    config = load({"cluster": {"kind": "ray"}, "model": {"name": None, "architecture": TINY}})
    with (
        pytest.raises(ConfigError, match="address=auto: wants a token: set RAY_AUTH_MODE"),
        ray_cluster.connected(config.cluster, 4),
    ):
        pass


@pytest.mark.usefixtures("without_ray")
def test_no_cluster_to_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs on this machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", cache(lambda: set[str]()))
    config = load({"cluster": {"kind": "ray"}, "model": {"name": None, "architecture": TINY}})
    with (
        pytest.raises(ConfigError, match="address=auto: no Ray cluster answers there"),
        ray_cluster.connected(config.cluster, 4),
    ):
        pass
