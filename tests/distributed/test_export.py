"""task=export: what plain transformers loads from the directory is what the ranks saved."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_reference import FAMILIES, TYPES, saved, settings_of
from rank_cases import trainer
from rank_pool import RankPool
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from tp_trainer import cli
from tp_trainer.assets import TOKENIZER
from tp_trainer.checkpoint.saving import Checkpoints
from tp_trainer.checkpoint.state import RunState
from tp_trainer.config import Cluster, ConfigError, load, to_yaml
from tp_trainer.driver import RunFailed
from tp_trainer.tasks import export, train

ROOT = Path(__file__).resolve().parents[2]
TINY = 1e-4  # GiB: a file for every tensor or two


def save_untouched(settings: dict[str, Any], run_dir: str) -> None:
    made = trainer(settings)
    state = RunState(3, epoch=0, offset=24, tokens=99, global_batch_size=8)
    Checkpoints(run_dir, 2, made.model.module, made.optimizer, made.mesh.device).save(state)


@pytest.fixture(scope="module")
def runs(
    ranks: RankPool, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The directory of a run of a family at tp2_dp2, from `models`, saved at step 3 before it did
    anything. Made once.
    """
    base = tmp_path_factory.mktemp("runs")

    def run(family: str) -> Path:
        directory = base / family
        if not directory.exists():
            settings = settings_of(saved(models, family), 2, 2)
            ranks.run(4, save_untouched, settings, str(directory))
            (directory / "config.yaml").write_text(to_yaml(load(settings)))
        return directory

    return run


def with_tokenizer(run: Path, copy: Path) -> Path:
    """The same run, had it used the embedded tokenizer."""
    shutil.copytree(run, copy)
    stored = (run / "config.yaml").read_text()
    (copy / "config.yaml").write_text(stored.replace("tokenizer: null", "tokenizer: embedded"))
    assert stored.count("tokenizer: null") == 1
    return copy


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs run in this process: Ray has a test of its own."""

    def run_jobs(
        cluster: Cluster, function: Callable[[Any], Any], jobs: Sequence[Any], memory: Sequence[int]
    ) -> list[Any]:
        assert len(memory) == len(jobs)
        return [function(job) for job in jobs]

    monkeypatch.setattr(export, "run_jobs", run_jobs)


def exported(run: Path | str, output: Path | str, **keys: Any) -> export.Exported:
    # of the command line: it must not matter
    architecture = {**FAMILIES["llama"], "num_hidden_layers": 7}
    settings = settings_of(
        architecture,
        checkpoint={"path": f"{run}/step_00000003"},
        export={"output": str(output), **keys},
    )
    return export.run(load({**settings, "task": "export"}))


def reloaded(directory: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    return model


def original(models: Path, family: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(saved(models, family), dtype=torch.float32)


def differing(model: Any, other: Any) -> list[str]:
    one, two = dict(model.named_parameters()), dict(other.named_parameters())
    assert list(one) == list(two)
    return [
        name
        for name in one
        if one[name].dtype != two[name].dtype or not torch.equal(one[name], two[name])
    ]


# --------------------------------------------------------------------------------------------------


@pytest.mark.families
@pytest.mark.sampled(6)
@pytest.mark.parametrize("family", [*TYPES, "qwen2_tied", "odd_vocabulary_tied", "phi3_awkward"])
@pytest.mark.usefixtures("here")
def test_float32_is_bit_equal(
    runs: Callable[[str], Path], models: Path, tmp_path: Path, family: str
) -> None:
    summary = exported(runs(family), tmp_path / "out", dtype="float32")
    before, after = original(models, family), reloaded(tmp_path / "out")
    assert differing(before, after) == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    tied = before.config.tie_word_embeddings
    assert (after.lm_head.weight is after.get_input_embeddings().weight) is tied
    with (
        safe_open(tmp_path / "out/model.safetensors", framework="pt") as mine,
        safe_open(f"{saved(models, family)}/model.safetensors", framework="pt") as theirs,
    ):
        assert set(mine.keys()) == set(theirs.keys())
    ignored = ("transformers_version", "dtype", "_name_or_path")
    one, two = (
        {k: v for k, v in model.config.to_dict().items() if k not in ignored}
        for model in (before, after)
    )
    assert one == two
    parameters = sum(p.numel() for p in before.parameters())
    assert (summary["parameters"], summary["bytes"], summary["files"]) == (
        parameters,
        4 * parameters,
        1,
    )


@pytest.mark.usefixtures("here")
def test_bfloat16_is_the_cast_one(
    runs: Callable[[str], Path], models: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()  # an empty directory will do
    exported(runs("qwen2_tied"), tmp_path / "out")
    after = reloaded(tmp_path / "out")
    assert after.dtype == torch.bfloat16 == after.config.dtype
    assert differing(original(models, "qwen2_tied").to(torch.bfloat16), after) == []


@pytest.mark.parametrize("url", [False, True])
@pytest.mark.usefixtures("here")
def test_several_files_with_an_index(
    runs: Callable[[str], Path], models: Path, tmp_path: Path, url: bool
) -> None:
    scheme, out = "file://" if url else "", tmp_path / "deep" / "out"
    summary = exported(
        f"{scheme}{runs('qwen2')}", f"{scheme}{out}", dtype="float32", max_shard_gib=TINY
    )
    assert differing(original(models, "qwen2"), reloaded(out)) == []
    index = json.loads((out / export.INDEX).read_text())
    names = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(names) == summary["files"] > 3 and set(index["weight_map"].values()) == set(names)
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    for name in names:
        with safe_open(out / name, framework="pt") as file:
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118
            assert {index["weight_map"][key] for key in file.keys()} == {name}  # noqa: SIM118
            assert sum(sizes) <= TINY * 2**30 or len(sizes) == 1
    assert index["metadata"]["total_size"] == summary["bytes"]
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing else is left"


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
@pytest.mark.usefixtures("here")
def test_tokenizer(
    runs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    """AutoTokenizer takes a class of its own for qwen2, whatever the files say: the embedded
    tokenizer is made so that it is the same.
    """
    exported(with_tokenizer(runs(family), tmp_path / "run"), tmp_path / "out")
    note = "PreTrainedTokenizerFast.from_pretrained('" in capsys.readouterr().out
    assert note is (
        json.loads(parts(AutoTokenizer, tmp_path / "out"))
        != json.loads(parts(AutoTokenizer, TOKENIZER))
    )
    assert not note
    after = (PreTrainedTokenizerFast if note else AutoTokenizer).from_pretrained(tmp_path / "out")
    given = AutoTokenizer.from_pretrained(TOKENIZER)
    text = "Call me Ishmael. Some years ago—never mind how long precisely"
    assert (
        after(text)["input_ids"] == given(text)["input_ids"]
        and after.decode(after(text)["input_ids"]) == text
    )
    assert after.get_vocab() == given.get_vocab()
    assert after.eos_token == given.eos_token


def parts(kind: Any, directory: Path) -> str:
    """How a tokenizer splits text."""
    whole = json.loads(kind.from_pretrained(directory).backend_tokenizer.to_str())
    return json.dumps([whole["normalizer"], whole["pre_tokenizer"]])


@pytest.mark.usefixtures("here")
def test_the_models_own_generation_config_is_kept(
    runs: Callable[[str], Path], models: Path, tmp_path: Path
) -> None:
    own = Path(saved(models, "qwen2")) / "generation_config.json"
    before = own.read_text()
    try:
        GenerationConfig(eos_token_id=[5, 7], do_sample=True, top_p=0.8).save_pretrained(own.parent)
        exported(runs("qwen2"), tmp_path / "out")
    finally:
        own.write_text(before)
    generation = reloaded(tmp_path / "out").generation_config
    assert (generation.eos_token_id, generation.top_p) == ([5, 7], 0.8)


@pytest.mark.usefixtures("here")
def test_a_model_from_random_weights_ends_text_as_its_tokenizer_does(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    run = with_tokenizer(runs("llama"), tmp_path / "run")
    stored = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(stored.replace("weights: pretrained", "weights: random"))
    exported(run, tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(TOKENIZER)
    generation = reloaded(tmp_path / "out").generation_config
    assert (generation.bos_token_id, generation.eos_token_id) == (
        ids.bos_token_id,
        ids.eos_token_id,
    )


@pytest.mark.slow
def test_from_the_command_line_through_ray(
    runs: Callable[[str], Path], models: Path, tmp_path: Path
) -> None:
    """Relative paths, as one types them; every file is written by a worker of Ray."""
    run = with_tokenizer(runs("qwen2_tied"), tmp_path / "run")
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "task=export",
        "checkpoint.path=run/step_00000003",
        "export.output=out",
        "export.dtype=float32",
        "export.max_shard_gib=0.0002",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert f"{tmp_path}/out" in done.stdout and "float32" in done.stdout and "step 3" in done.stdout
    assert differing(original(models, "qwen2_tied"), reloaded(tmp_path / "out")) == []
    assert (tmp_path / "out" / export.INDEX).is_file() and (
        tmp_path / "out/tokenizer.json"
    ).is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert run.is_dir()


# --------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a refusal. Exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["task=export", *argv])
    out, err = capsys.readouterr()
    assert (
        end.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    ), err
    return err


def test_refusals(
    runs: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    monkeypatch.setattr(export, "run_jobs", lambda *_: pytest.fail("Ray was started"))
    run, out = runs("qwen2"), tmp_path / "out"
    path, output = f"checkpoint.path={run}/step_00000003", f"export.output={out}"
    assert "checkpoint.path: is missing" in refused(capsys, output)
    assert "export.output: is missing" in refused(capsys, path)
    line = refused(capsys, f"checkpoint.path={run}", output)
    assert "its name is not step_<number>" in line and f"e.g. {run}/step_00000003" in line
    assert f"is not there; the newest there is {run}/step_00000003" in refused(
        capsys, f"checkpoint.path={run}/step_00000004", output
    )
    assert "is not there" in refused(capsys, f"checkpoint.path={tmp_path}/nowhere", output)
    assert "not known" in refused(capsys, "checkpoint.path=nonsense://a/step_00000004", output)

    damaged = tmp_path / "damaged"
    shutil.copytree(run / "step_00000003", damaged / "step_00000003")
    of_damaged = f"checkpoint.path={damaged}/step_00000003"
    assert f"{damaged}/config.yaml is missing" in refused(capsys, of_damaged, output)
    (damaged / "config.yaml").write_text("model: 3\n")
    assert "states no model.architecture" in refused(capsys, of_damaged, output)
    stored = (run / "config.yaml").read_text()
    (damaged / "config.yaml").write_text(
        stored.replace("intermediate_size: 128", "intermediate_size: 256")
    )
    line = refused(capsys, of_damaged, output)
    assert "mlp.down_proj.weight has shape (64, 128), the model's is (64, 256)" in line
    (damaged / "config.yaml").write_text(
        stored.replace("tokenizer: null", "tokenizer: /nowhere/at/all")
    )
    assert "data.tokenizer=/nowhere/at/all: can't be loaded" in refused(capsys, of_damaged, output)
    shard = next((damaged / "step_00000003").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"damaged: {shard.name} has" in refused(capsys, of_damaged, output)

    assert "export.output" in refused(capsys, path, f"export.output={damaged}") and damaged.is_dir()
    assert "is there already" in refused(capsys, path, f"export.output={damaged}/config.yaml")
    assert "not writable" in refused(capsys, path, f"export.output={damaged}/config.yaml/out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["damaged"], (
        "a refusal leaves nothing behind"
    )


@pytest.mark.parametrize("before", [False, True])
def test_a_failed_export_leaves_nothing(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    def fail(cluster: Cluster, function: Any, jobs: Any, memory: Any) -> None:
        function(jobs[0])
        assert len(list(tmp_path.glob("out.part-*/model*.safetensors"))) == 1
        raise RunFailed("the disk is full")

    monkeypatch.setattr(export, "run_jobs", fail)
    if before:
        (tmp_path / "out").mkdir()
    with pytest.raises(RunFailed, match="the disk is full"):
        exported(runs("qwen2"), tmp_path / "out", max_shard_gib=TINY)
    assert [each.name for each in tmp_path.rglob("*")] == (["out"] if before else [])


def test_a_node_that_does_not_see_the_output_says_so(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    file = export.File(
        f"{runs('qwen2')}/step_00000003",
        f"{tmp_path}/out.part-123",
        "model.safetensors",
        {},
        "float32",
        {},
    )
    with pytest.raises(ConfigError, match=r"export\.output=.*/out: node .* doesn't see it"):
        export.write_file(file)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("here")
def test_float16_that_does_not_hold_the_values(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def huge(path: str, tensors: dict[str, torch.Tensor]) -> None:
        for tensor in tensors.values():
            tensor.copy_(torch.full(tensor.shape, 1e6))

    monkeypatch.setattr("tp_trainer.checkpoint.restoring.read_parameters", huge)
    with pytest.raises(
        ConfigError, match=r"export\.dtype=float16: model\.embed_tokens\.weight has values"
    ):
        exported(runs("qwen2"), tmp_path / "out", dtype="float16")


@pytest.mark.usefixtures("here")
def test_at_the_end_of_a_training(
    runs: Callable[[str], Path], tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, output = runs("qwen3"), tmp_path / "out"
    trained: list[str] = []

    def training(config: Any) -> dict[str, Any]:
        trained.append(config.task)
        return {"status": status, "checkpoint": f"{run}/step_00000003"}

    monkeypatch.setattr("tp_trainer.driver.train", training)
    settings = settings_of(
        saved(models, "qwen3"), export={"output": str(output), "dtype": "float32"}
    )
    status = "stopped"
    train.run(load(settings))
    assert trained == ["train"] and not output.exists(), "a run that was stopped goes on later"
    status = "finished"
    assert train.run(load(settings))["checkpoint"] == f"{run}/step_00000003"
    for name, value in (
        AutoModelForCausalLM.from_pretrained(saved(models, "qwen3"), dtype=torch.float32)
        .state_dict()
        .items()
    ):
        assert torch.equal(
            value,
            AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).state_dict()[name],
        )
    with pytest.raises(ConfigError, match="is there already"):
        train.run(load(settings))
    assert trained == ["train", "train"], "refused before the training"
