"""Compute in bfloat16 goes the way of float32: what is computed with follows the parameters from
step to step, in every layout.
"""

from __future__ import annotations

from typing import Any

import pytest
from plain_reference import FAMILIES, settings_of
from rank_cases import trainer
from rank_pool import RankPool

from tp_trainer.loop import evaluate


def steps(settings: dict[str, Any]) -> dict[str, list[float]]:
    made = trainer(settings)
    losses, norms = zip(*(made.step() for _ in range(5)), strict=True)
    return {
        "losses": list(losses),
        "norms": list(norms),
        "evaluation": [evaluate(made.model, made.data.evaluation(), made.mesh)],
    }


@pytest.mark.sampled(3)
@pytest.mark.parametrize("family", ["llama", "odd_vocabulary"])
@pytest.mark.parametrize(
    "parallelism",
    [
        {"tp": 1, "dp": 1},
        {"tp": 2, "dp": 1},
        {"tp": 2, "dp": 2},
        {"tp": 1, "dp": 4},
        {"tp": 2, "dp": 2, "dp_replicate": 2},
    ],
    ids=["tp1_dp1", "tp2_dp1", "tp2_dp2", "tp1_dp4", "rep2"],
)
def test_bfloat16_follows_float32(
    ranks: RankPool, family: str, parallelism: dict[str, Any]
) -> None:
    def run(dtype: str) -> dict[str, list[float]]:
        settings = settings_of(
            FAMILIES[family],
            parallelism={**parallelism, "param_dtype": dtype},
            optim={"lr": 1e-2},
            train={"eval_batches": 1},
        )
        return ranks.run(parallelism["tp"] * parallelism["dp"], steps, settings)[0]

    full, low = run("float32"), run("bfloat16")
    assert full["norms"][-1] < 0.8 * full["norms"][0], "the steps change something"
    assert low["norms"] != full["norms"], "the precision is lower"
    assert low["losses"] == pytest.approx(full["losses"], rel=1e-3)
    assert low["evaluation"] == pytest.approx(full["evaluation"], rel=1e-3)
    assert low["norms"] == pytest.approx(full["norms"], rel=3e-2)
