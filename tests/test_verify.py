"""task=verify: what it compares, its verdict, its exit codes, and once all of it through Ray."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from configs import TINY_RUN
from ray.train.v2.api.exceptions import WorkerGroupError

from tp_trainer import cli
from tp_trainer.checkpoint.owner import Owner
from tp_trainer.checkpoint.store import Store
from tp_trainer.config import Unrecoverable, load, to_yaml
from tp_trainer.driver import RunFailed, training, workers
from tp_trainer.driver.ending import Ending
from tp_trainer.messages import Pair, Start, StepCompared
from tp_trainer.parallel.drift import Drifted
from tp_trainer.tasks import reference
from tp_trainer.tasks.verify import FULL, REDUCED, judge, shrunk, tolerances_for
from tp_trainer.tracker import Outside
from tp_trainer.view import View

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parent.parent
TINY: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


@pytest.mark.slow
def test_through_ray(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "task=verify",
        "parallelism=tp2_dp1",
        "data=random",
        "data.seq_length=64",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
        "verify.steps=3",
        "cluster.device=cpu",
        "experiment_name=checked",
        f"checkpoint.storage_path={tmp_path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "checked" / "verify.json").read_text())
    assert (
        result["status"] == "passed"
        and result["faults"] == []
        and result["dtypes"] == ["float32", "float32"]
    )
    assert result["tolerances"] == {"loss": 1e-6, "gradient_norm": 1e-5, "gradient_at_step_1": 1e-5}
    assert [row["step"] for row in result["steps"]] == [1, 2, 3]
    for row in result["steps"]:
        assert (
            row["loss"]["difference"] <= 1e-6
            and row["gradient_norm"]["difference"] <= 1e-5
            and row["drifted"] == []
        )
        assert len(row["gradients"]) == len(row["parameters"]) == 2 * 12 + 3
    assert max(result["steps"][0]["gradients"].values()) <= 1e-5
    assert "dropout: all 0" in done.stdout and "layers: 2 of 4" in done.stdout
    assert "step   3  loss " in done.stdout and "passed on cpu, float32" in done.stdout
    assert list((tmp_path / "checked" / "verify").glob("weights-*")) == []


def test_a_refused_family_or_layout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for override, said in (
        ("model.architecture.model_type=gpt2", "gpt2 has no such field"),
        ("parallelism.tp=3", "must divide"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["task=verify", override])
        assert end.value.code == 2 and said in capsys.readouterr().err


def test_the_reference_is_independent() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert {name for name in modules if name and name.startswith("tp_trainer")} == {
        "tp_trainer.batch",
        "tp_trainer.config",
        "tp_trainer.data",
    }


# --------------------------------------------------------------------------------------------------


def test_the_model_is_shrunk_in_depth_alone(tmp_path: Path) -> None:
    fields = {
        **TINY,
        "layer_types": ["full_attention"] * 3,
        "no_rope_layers": [1, 0, 1],
        "attention_dropout": 0.1,
        "resid_pdrop": 0.2,
    }
    values = {
        "model": {"architecture": fields},
        "checkpoint": {"storage_path": str(tmp_path)},
        "data": {"seq_length": 64},
    }
    config, changes = shrunk(
        load({**values, "experiment_name": "x", "verify": {"layers": 2, "lr": 1e-5}})
    )
    numbers = config.model.architecture
    assert (
        numbers["num_hidden_layers"] == 2
        and len(numbers["layer_types"]) == 2
        and numbers["no_rope_layers"] == [1, 0]
    )
    assert numbers["attention_dropout"] == numbers["resid_pdrop"] == 0
    assert {key: numbers[key] for key in TINY if key != "num_hidden_layers"} == {
        k: v for k, v in TINY.items() if k != "num_hidden_layers"
    }
    assert config.model.weights == "random" and (
        config.optim.lr,
        config.optim.schedule,
        config.optim.warmup_steps,
    ) == (1e-5, "constant", 0)
    assert config.run_dir == f"{tmp_path}/x/verify" and config.train.max_steps == 5
    assert changes[:2] == [
        "layers: 2 of 3 (verify.layers)",
        "dropout: all 0 (attention_dropout was 0.1, resid_pdrop was 0.2)",
    ]
    whole, _ = shrunk(load({**values, "verify": {"layers": None}}))
    assert (
        whole.model.architecture["num_hidden_layers"] == 3
        and len(whole.model.architecture["layer_types"]) == 3
    )


# --------------------------------------------------------------------------------------------------


def row(step: int = 1, loss: float = 1e-8, norm: float = 1e-8, **changes: Any) -> StepCompared:
    gradients = {"model.norm.weight": 1e-7, "model.layers.1.mlp.up_proj.weight": 2e-7}
    compared = StepCompared(
        step, Pair(1.0, 1.0, loss), Pair(1.0, 1.0, norm), gradients, gradients, drifted=[]
    )
    return replace(compared, **changes)


def test_the_verdict() -> None:
    bad = {"model.norm.weight": 2e-5, "model.layers.1.mlp.up_proj.weight": 1e30}
    # later gradients and parameters aren't judged
    assert judge([row(), row(2, gradients=bad, parameters=bad)], FULL) == []
    assert judge([row(gradients=bad)], FULL) == [
        (
            "step 1: the gradient of model.layers.1.mlp.up_proj.weight (layer 1) differs by"
            " 1.0e+30, allowed is 1e-05"
        ),
        (
            "step 1: the gradient of model.norm.weight (outside the layers) differs by 2.0e-05,"
            " allowed is 1e-05"
        ),
    ]
    assert judge([row(), row(2, loss=2e-6, norm=2e-5)], FULL) == [
        f"step 2: the {what} differs by {by}, allowed is {allowed}; the worst gradient there is"
        " that of model.layers.1.mlp.up_proj.weight (layer 1)"
        for what, by, allowed in (
            ("loss", "2.0e-06", "1e-06"),
            ("gradient norm", "2.0e-05", "1e-05"),
        )
    ]
    assert judge([row(drifted=["model.norm.weight"])], FULL)[0].startswith(
        "step 1: model.norm.weight (outside the layers) is replicated"
    )
    assert (
        judge([row(loss=1.9e-3, norm=1, gradients=bad)], REDUCED) == []
        and len(judge([row(loss=2.1e-3)], REDUCED)) == 1
    )


def test_tolerances_follow_the_precision() -> None:
    config = load({"model": {"architecture": TINY}, "data": {"seq_length": 64}})
    assert tolerances_for(config, ["float32", "float32"], "cpu") == FULL
    assert tolerances_for(config, ["float32", "float32"], "cuda").gradient_at_step_1 == 5e-5
    assert (
        tolerances_for(config, ["bfloat16", "float32"], "cuda")
        == tolerances_for(config, ["float32", "bfloat16"], "cpu")
        == REDUCED
    )
    config.parallelism.float8 = True
    assert tolerances_for(config, ["float32", "float32"], "cpu") == REDUCED
    config.verify.tolerance = 1e-3
    assert tolerances_for(config, ["bfloat16", "float32"], "cpu").loss == 1e-3


# --------------------------------------------------------------------------------------------------


def drifting(*_: object) -> None:
    raise Drifted("step 7: model.norm.weight has drifted apart")


def test_a_drift_ends_the_run_and_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(Unrecoverable) as raised:
        workers._worker(
            {
                "environment": {},
                "recipe": f"{__name__}:drifting",
                "config": TINY_RUN,
                "start": Start("launch", "none"),
                "progress": None,
            }
        )
    failed = WorkerGroupError("a worker failed", {1: raised.value})
    monkeypatch.setattr(training, "fit", lambda *_: (failed, None))
    config = load(
        {
            "model": {"architecture": TINY},
            "data": {"seq_length": 64},
            "checkpoint": {"storage_path": str(tmp_path)},
        }
    )
    store = Store(config.run_dir)
    config.tracker.kind = "none"
    tracker = Outside(config, {}, print)
    with pytest.raises(
        RunFailed, match=r"^rank 1: step 7: model\.norm\.weight has drifted apart .*the same$"
    ):
        ending = Ending(config, store, View(), 0.0)
        training._fit("none", Owner(store, "launch"), tracker, ending, to_yaml(config))
    summary = store.read_json("summary.json")
    assert summary is not None and (summary["status"], summary["restarts"]) == ("failed", 0)
    assert "drifted" in summary["failures"][0]
