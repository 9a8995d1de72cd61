"""torch.compile: one graph serves all layers, in every layout and family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.utils
from plain_reference import FAMILIES, settings_of
from rank_cases import NEEDS_COMPILER, trainer
from rank_pool import RankPool
from torch import nn

from tp_trainer.loop import evaluate


def compile_to_graphs(module: nn.Module, **_: Any) -> None:
    """Module.compile, but for the code generation, which takes long and changes nothing here."""
    module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")


def graphs(settings: dict[str, Any]) -> tuple[int, int, list[tuple[float, float]]]:
    """How many graphs two steps take, how many frames broke off, and losses and norms."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "compile", compile_to_graphs)
        made = trainer(settings)
    steps = [made.step() for _ in range(2)]
    counters = torch._dynamo.utils.counters
    found = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()), steps
    evaluate(made.model, made.data.evaluation(), made.mesh)
    warm = counters["stats"]["unique_graphs"]
    for _ in range(2):
        made.step()
        evaluate(made.model, made.data.evaluation(), made.mesh)
    assert counters["stats"]["unique_graphs"] == warm, "something is compiled anew"
    return found


BOTH = {"tp": 2, "dp": 2}


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("family", "parallelism"),
    [
        ("qwen2", BOTH),
        ("qwen2", {"tp": 1, "dp": 2}),
        ("qwen2", {"tp": 2, "dp": 1, "activation_checkpointing": "selective"}),
        ("qwen2", {"tp": 2, "dp": 1, "activation_checkpointing": "full"}),
        ("phi3", BOTH),
        ("one_kv_head", BOTH),
        ("olmo2", BOTH),
        ("qwen3", BOTH),
    ],
)
def test_one_graph_serves_all_layers(
    ranks: RankPool, family: str, parallelism: dict[str, Any]
) -> None:
    def of(layers: int, compiled: bool) -> tuple[int, int, list[tuple[float, float]]]:
        architecture = {**FAMILIES[family], "num_hidden_layers": layers}
        settings = settings_of(architecture, parallelism={**parallelism, "compile": compiled})
        return ranks.run(parallelism["tp"] * parallelism["dp"], graphs, settings)[0]

    few, many = of(2, True), of(5, True)
    assert 0 < many[0] == few[0], "layers have graphs of their own"
    assert many[1] == few[1] == 0, "a graph breaks off"
    for got, expected in zip(many[2], of(5, False)[2], strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


def compiled_steps(settings: dict[str, Any]) -> list[tuple[float, float]]:
    made = trainer(settings)
    return [made.step() for _ in range(2)]


@NEEDS_COMPILER
@pytest.mark.matrix
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs AVX-512, to have two"
)
def test_a_cache_from_another_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As machines of several kinds share a home directory."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def steps(compiled: bool, capability: str) -> list[tuple[float, float]]:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        settings = settings_of(FAMILIES["qwen2"], parallelism={"tp": 1, "compile": compiled})
        pool = RankPool(1)
        try:
            return pool.run(1, compiled_steps, settings)[0]  # type: ignore[no-any-return]
        finally:
            pool.stop()

    steps(True, "avx2")
    for got, expected in zip(steps(True, "avx512"), steps(False, "avx512"), strict=True):
        assert got == pytest.approx(expected, rel=1e-5)
