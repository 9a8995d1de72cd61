"""Families and layouts on GPUs as they run there, compiled and replayed, against plain transformers
on the CPU.
"""

from __future__ import annotations

import faulthandler
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_ranks import SIZE, spawn
from plain_reference import Reference, global_batches, saved, settings_of
from rank_cases import trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(SIZE not in (2, 4), reason="needs two GPUs, or four"),
]
STEPS = 6  # the last three of them replayed
# of the families those that differ in what a GPU runs: others share their kernels and graphs
MANY = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "granite",
    "glm4",
    "cohere2",
    "apertus",
    "gpt_neox",
    "qwen3_5_text",
    "lfm2",
    "youtu",
    "llama_biases",
    "yarn",
    "dynamic",
    "longrope",
    "one_kv_head",
    "odd_vocabulary_tied",
    "phi3_kv2",
]
FEW = ["llama", "qwen2_tied", "gemma3_text", "phi3", "olmo2"]
TWO = ["llama", "phi3"]  # ranks that share a GPU take turns, and their time
FLOAT32 = {"loss": 2e-6, "norm": 5e-5}  # relative
BFLOAT16 = {"loss": 5e-3, "norm": 5e-2}
FLOAT8 = {"loss": 1e-2, "norm": 0.1}
LAYOUTS: dict[int, list[tuple[dict[str, Any], list[str]]]] = {
    2: [
        ({"tp": 2, "dp": 1}, MANY),
        ({"tp": 1, "dp": 2}, MANY),
        ({"tp": 1, "dp": 2, "direct_fsdp": False}, FEW),
        ({"tp": 2, "dp": 1, "float8": True}, TWO),
        ({"tp": 1, "dp": 2, "dp_replicate": 2}, TWO),
    ],
    4: [
        ({"tp": 2, "dp": 2}, TWO),
        ({"tp": 4, "dp": 1}, TWO),
        ({"tp": 2, "dp": 2, "async_tp": True, "direct_fsdp": True}, TWO),
        ({"tp": 4, "dp": 1, "async_tp": True, "float8": True}, TWO),
        ({"tp": 2, "dp": 2, "dp_replicate": 2}, TWO),
        ({"tp": 1, "dp": 4, "dp_replicate": 2, "direct_fsdp": True}, TWO),
    ],
}


def on_a_rank(
    device: torch.device, cases: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, float]]]
) -> None:
    """Every case of a layout; those that are off or end in an error are told of together."""
    failed: dict[str, Any] = {}
    for name, (settings, expected, tolerance) in cases.items():
        # ranks that wait for one another say where
        faulthandler.dump_traceback_later(300, exit=True)
        torch._dynamo.reset()
        made = trainer(settings, device)
        with closing(made.model):
            try:
                losses, norms = zip(*(made.step() for _ in range(STEPS)), strict=True)
                assert made.model.graphs and made.model.graphs.graphs, "nothing was replayed"
            except Exception as error:  # of this family, on all ranks alike
                failed[name] = f"{type(error).__name__}: {error}"[:500]
                sys.stdout.write(f"{name} {failed[name]}\n")
                continue
        off = {"loss": worst(losses, expected["losses"]), "norm": worst(norms, expected["norms"])}
        sys.stdout.write(f"{name} {off}\n")
        if not all(off[key] <= tolerance[key] for key in tolerance):
            failed[name] = off
    faulthandler.cancel_dump_traceback_later()
    assert not failed, failed


def worst(given: Any, expected: Any) -> float:
    """The largest relative difference; nan where one is."""
    return (
        torch.tensor([abs(a - b) / abs(b) for a, b in zip(given, expected, strict=True)])
        .max()
        .item()
    )


def name_of(layout: dict[str, Any]) -> str:
    return "_".join(f"{key}{value}" for key, value in layout.items())


@pytest.mark.parametrize(
    ("layout", "families"),
    [pytest.param(*each, id=name_of(each[0])) for each in LAYOUTS.get(SIZE, [])],
)
def test_steps_are_those_of_plain_transformers(
    tmp_path: Path, models: Path, layout: dict[str, Any], families: list[str]
) -> None:
    cases = {}
    for family in families:
        base = settings_of(
            saved(models, family), optim={"lr": 1e-4}, cluster={"device": "gpu"}, parallelism=layout
        )
        expected = Reference(base).run(global_batches(base, STEPS))
        figures = {key: expected[key] for key in ("losses", "norms")}
        for dtype, tolerance in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
            tolerance = FLOAT8 if "float8" in layout else tolerance
            if dtype == "float32" or family in FEW:
                settings = {**base, "parallelism": {**layout, "param_dtype": dtype}}
                cases[f"{family} {dtype}"] = settings, figures, tolerance
    spawn(on_a_rank, tmp_path / "store", cases)
