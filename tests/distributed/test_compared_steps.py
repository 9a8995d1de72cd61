"""The ranks' half of task=verify, and the drift check: sound layouts pass, a broken mechanism is
named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_reference import FAMILIES, settings_of
from rank_cases import trainer
from rank_pool import RankPool

import tp_trainer.loop
import tp_trainer.models.model
from tp_trainer.config import load, plain
from tp_trainer.loop import Hooks, Position, train
from tp_trainer.messages import StepCompared
from tp_trainer.parallel.drift import Drifted, drifted
from tp_trainer.tasks.parity import compared_steps
from tp_trainer.tasks.verify import FULL, REDUCED, judge, shrunk


def verify(settings: dict[str, Any], broken: str | None = None) -> list[StepCompared | None]:
    """The rows of differences, on rank 0; `broken`: the mechanism that is taken away."""
    config, _ = shrunk(load(settings))
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    made = trainer(plain(config))
    with pytest.MonkeyPatch.context() as patch:
        if broken == "sum_over_tp":
            patch.setattr(tp_trainer.models.model, "sum_over_tp", lambda *_: None)
        elif broken == "clip":
            patch.setattr(tp_trainer.loop, "clip_divisor", lambda norm, _: torch.ones_like(norm))
        return list(compared_steps(made, "none"))


def settings_at(
    directory: Path, family: str, parallelism: dict[str, Any], steps: int = 3, **verify: Any
) -> dict[str, Any]:
    architecture = {**FAMILIES[family], "num_hidden_layers": 3}
    train = {"clip_grad_norm": 0.3}
    return settings_of(
        architecture,
        parallelism=parallelism,
        train=train,
        checkpoint={"storage_path": str(directory)},
        verify={"steps": steps, **verify},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "parallelism"),
    [
        ("qwen2", {"tp": 2, "dp": 2}),
        ("qwen2_tied", {"tp": 4, "dp": 1}),
        ("qwen3", {"tp": 2, "dp": 2, "sequence_parallel": False}),
        ("qwen2_dropout", {"tp": 1, "dp": 2}),
        ("mistral", {"tp": 2, "dp": 1}),
    ],
)
def test_sound_layouts_pass(
    ranks: RankPool, tmp_path: Path, family: str, parallelism: dict[str, Any]
) -> None:
    rows, *others = ranks.run(
        parallelism["tp"] * parallelism["dp"], verify, settings_at(tmp_path, family, parallelism)
    )
    assert (
        judge(rows, FULL) == []
        and len(rows) == 3
        and all(row is None for other in others for row in other)
    )
    assert all(row.gradient_norm.reference > 0.3 for row in rows), "clipping is not active"
    assert not [name for name in rows[0].gradients if ".layers.2." in name] and [
        n for n in rows[0].gradients if ".layers.1." in n
    ]
    assert max(rows[0].gradients.values()) > 0, "compared with itself"
    assert not list(tmp_path.rglob("*.safetensors"))


def test_bfloat16(ranks: RankPool, tmp_path: Path) -> None:
    """The reference computes in bfloat16 too: in float32 the loss would be further off."""
    rows = ranks.run(
        2, verify, settings_at(tmp_path, "qwen2", {"tp": 2, "dp": 1, "param_dtype": "bfloat16"})
    )[0]
    assert judge(rows, REDUCED) == []
    assert judge(rows, FULL) != []


def test_a_sum_that_is_missing_is_named(ranks: RankPool, tmp_path: Path) -> None:
    rows = ranks.run(
        2, verify, settings_at(tmp_path, "qwen2", {"tp": 2, "dp": 1}, steps=1), "sum_over_tp"
    )[0]
    faults = judge(rows, FULL)
    named = {name for name, part in rows[0].gradients.items() if part > 1e-5}
    assert named == {name for name in rows[0].gradients if "norm" in name}
    assert "norm.weight (" in faults[0] and "differs by" in faults[0]
    assert set(rows[0].drifted) <= named and rows[0].drifted


def test_clipping_that_is_missing_is_seen(ranks: RankPool, tmp_path: Path) -> None:
    """Adam hides a scale of the gradients; epsilon and the moments of another step don't."""
    rows = ranks.run(
        2, verify, settings_at(tmp_path, "qwen2", {"tp": 2, "dp": 1}, lr=1e-3), "clip"
    )[0]
    assert max(rows[0].gradients.values()) <= 1e-5
    assert max(rows[1].parameters.values()) > 1e-5


# --------------------------------------------------------------------------------------------------

SMALL = {"log_interval": 100, "eval_interval": None, "eval_batches": 1, "max_steps": 4}


def nudge(made: Any, name: str) -> None:
    """The least change of one number, on rank 1 alone."""
    if dist.get_rank() == 1:
        local = made.model.module.get_parameter(name).data.to_local()
        local[0] = torch.nextafter(local[0], torch.tensor(9.0))


def run_until_drift(settings: dict[str, Any], name: str | None) -> str:
    made = trainer(settings)
    hooks = Hooks(
        log=lambda _: None,
        save=lambda *_: None,
        stepped=lambda step: nudge(made, name) if name and step == 1 else None,
    )
    try:
        outcome = train(
            made.config, made.model, made.optimizer, made.data, made.mesh, Position(), hooks
        )
        return f"trained {outcome.position.step} steps"
    except Drifted as error:
        return str(error)


@pytest.mark.slow
def test_training_ends_at_a_drift(ranks: RankPool) -> None:
    name = "model.layers.1.input_layernorm.weight"
    settings = settings_of(FAMILIES["qwen2"], 2, 2, train={**SMALL, "drift_interval": 2})
    said = (
        f"step 2: {name} is replicated over tp and has drifted apart; resume from an earlier"
        " checkpoint"
    )
    # those of the other TP group too
    assert ranks.run(4, run_until_drift, settings, name) == [said] * 4
    assert ranks.run(4, run_until_drift, settings, None) == ["trained 4 steps"] * 4
    settings["train"]["drift_interval"] = None
    assert ranks.run(4, run_until_drift, settings, name) == ["trained 4 steps"] * 4


def drifts(settings: dict[str, Any]) -> list[str]:
    made = trainer(settings)
    nudge(made, "model.norm.weight")
    return drifted(made.model.module.named_parameters(), made.mesh)


def test_what_counts_as_replicated(ranks: RankPool) -> None:
    assert ranks.run(2, drifts, settings_of(FAMILIES["qwen2"], 2, 1)) == [["model.norm.weight"]] * 2
    # over dp parameters are sharded
    assert ranks.run(2, drifts, settings_of(FAMILIES["qwen2"], 1, 2)) == [[], []]
