"""Loss, gradient norm and parameters of every layout against plain transformers in one process, in
fp32.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import plain_reference
import pytest
from comparison import certify, compare
from plain_reference import TYPES, Reference, global_batches, saved, settings_of
from rank_cases import run_steps
from rank_pool import RankPool

STEPS = 10

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_dp2": {"tp": 2, "dp": 2},
    "tp1_dp4": {"tp": 1, "dp": 4},
    "tp4_dp1": {"tp": 4, "dp": 1},
    "tp2_dp1": {"tp": 2, "dp": 1},
    "tp1_dp1": {"tp": 1, "dp": 1},
    "tp2_dp2_rep2": {"tp": 2, "dp": 2, "dp_replicate": 2},
    "tp4_dp1_no_sp": {"tp": 4, "dp": 1, "sequence_parallel": False},
    "tp2_dp2_no_sp": {"tp": 2, "dp": 2, "sequence_parallel": False},
    "tp3_dp1": {"tp": 3, "dp": 1},
    "tp3_dp1_no_sp": {"tp": 3, "dp": 1, "sequence_parallel": False},
    "tp1_dp4_rep2": {"tp": 1, "dp": 4, "dp_replicate": 2},
}
CERTIFIED_LAYOUTS = ["tp2_dp1", "tp4_dp1", "tp2_dp2", "tp1_dp4"]


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module")
def certificates() -> dict[str, Any]:
    return {}


def check(
    ranks: RankPool, references: dict[str, Any], models: Path, family: str, layout: str, **data: Any
) -> None:
    settings = settings_of(saved(models, family), parallelism=LAYOUTS[layout], data=data)
    if family not in references:
        references[family] = Reference(settings).run(global_batches(settings, STEPS))
    compare(
        ranks.run(LAYOUTS[layout]["tp"] * LAYOUTS[layout]["dp"], run_steps, settings, STEPS),
        references[family],
    )


@pytest.mark.parametrize(
    "layout",
    [layout for layout in LAYOUTS if "tp3" not in layout and layout not in CERTIFIED_LAYOUTS],
)
def test_layout(ranks: RankPool, references: dict[str, Any], models: Path, layout: str) -> None:
    check(ranks, references, models, "qwen2", layout)


CERTIFIED = [*TYPES, "qwen2_tied", "one_kv_head", "odd_vocabulary_tied"]
SPLIT_BY_DEGREE = ("two_kv_heads", "odd_vocabulary", "phi3_kv2")
VARIANTS = [
    *(
        (name, "tp2_dp2")
        for name in ("llama_biases", "llama3_rope", "yarn", "dynamic", "longrope", *SPLIT_BY_DEGREE)
    ),
    *((name, "tp4_dp1") for name in SPLIT_BY_DEGREE),
    ("gpt_neox_serial", "tp2_dp2"),
]


@pytest.mark.families
@pytest.mark.sampled(12)
@pytest.mark.parametrize("layout", CERTIFIED_LAYOUTS)
@pytest.mark.parametrize("family", CERTIFIED)
def test_certificate(
    ranks: RankPool, certificates: dict[str, Any], models: Path, family: str, layout: str
) -> None:
    certify_family(ranks, certificates, models, family, layout)


# those are refused: a norm spans their keys
@pytest.mark.families
@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    "family", [f"{name}_awkward" for name in TYPES if name not in ("olmo2", "olmo3")]
)
def test_awkward_sizes(
    ranks: RankPool, certificates: dict[str, Any], models: Path, family: str
) -> None:
    certify_family(ranks, certificates, models, family, "tp4_dp1")


def certify_family(
    ranks: RankPool, certificates: dict[str, Any], models: Path, family: str, layout: str
) -> None:
    """20 steps: loss within 1e-6 and gradient norm within 1e-5 at each, every gradient within 1e-5
    at the first.
    """
    micro_batch = min(4, 8 // LAYOUTS[layout]["dp"])  # two where dp is 1
    settings = settings_of(
        saved(models, family),
        parallelism=LAYOUTS[layout],
        optim={"lr": 1e-4},
        train={"micro_batch_size": micro_batch},
    )
    if family not in certificates:
        reference, batches = Reference(settings), global_batches(settings, 20)
        exact = reference.exact_gradients(*batches[0])
        certificates[family] = reference.run(batches) | {"gradients": exact}
    certify(
        ranks.run(LAYOUTS[layout]["tp"] * LAYOUTS[layout]["dp"], run_steps, settings, 20)[0],
        certificates[family],
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("family", "layout"), VARIANTS)
def test_variant(
    ranks: RankPool, references: dict[str, Any], models: Path, family: str, layout: str
) -> None:
    check(ranks, references, models, family, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp3_dp1", "tp3_dp1_no_sp"])
def test_nine_heads_on_three_ranks(
    ranks: RankPool, references: dict[str, Any], models: Path, layout: str
) -> None:
    """SmolLM2-135M's shape: 9 heads, 3 key/value heads, tied; and a vocabulary that 3 doesn't
    divide.
    """
    check(ranks, references, models, "nine_heads", layout, seq_length=63)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "family",
    [
        "two_kv_heads",
        "phi3",
        "olmo2",
        "gemma2",
        "cohere2",
        "one_kv_head",
        "lfm2",
        "qwen3_5_text",
    ],
)
def test_more_families_without_sequence_parallelism(
    ranks: RankPool, references: dict[str, Any], models: Path, family: str
) -> None:
    check(ranks, references, models, family, "tp4_dp1_no_sp")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen2_tied"])
def test_family_without_sequence_parallelism(
    ranks: RankPool, references: dict[str, Any], models: Path, family: str
) -> None:
    check(ranks, references, models, family, "tp2_dp2_no_sp")


def test_mistral_window_matters(models: Path) -> None:
    """The reference itself sees the window: without it the losses are others, so parity can't pass
    by ignoring it.
    """
    settings = settings_of(saved(models, "mistral"))
    batch = global_batches(settings, 1)[0]
    narrow, wide = Reference(settings), Reference(settings)
    wide.model.config.sliding_window = None
    for layer in wide.model.model.layers:
        layer.self_attn.sliding_window = None
    assert abs(narrow.loss(*batch).item() - wide.loss(*batch).item()) > 1e-4


def test_the_reference_is_independent() -> None:
    tree = ast.parse(Path(plain_reference.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert {name for name in modules if name and name.startswith("tp_trainer")} == {
        "tp_trainer.config",
        "tp_trainer.data",
    }
