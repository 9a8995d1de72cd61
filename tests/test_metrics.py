"""FLOPs against a count of the model's own matrices; peaks; memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from tp_trainer.config import Architecture
from tp_trainer.metrics import (
    PEAK_FLOPS,
    flops_per_token,
    mfu,
    optimal_interval,
    peak_flops,
    peak_memory_gib,
)

CONF = Path(__file__).resolve().parent.parent / "conf" / "model"


def fields_of(group: str) -> dict[str, Any]:
    fields = OmegaConf.to_container(OmegaConf.load(CONF / f"{group}.yaml"), resolve=True)
    assert isinstance(fields, dict)
    return dict(fields["architecture"])


def meta_model(fields: dict[str, Any]) -> Any:
    with torch.device("meta"):
        config = AutoConfig.for_model(
            fields["model_type"],
            **{key: value for key, value in fields.items() if key != "model_type"},
        )
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


@pytest.mark.parametrize("group", ["llama3_8b", "qwen2_7b", "qwen3_0_6b", "smollm2_135m"])
def test_flops_per_token(group: str) -> None:
    """6 for each weight that a token is multiplied with; attention: 2 products of seq x head_dim a
    head, forward and twice backward.
    """
    fields, seq = fields_of(group), 4096
    model = meta_model(fields)
    weights = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)
    )
    queries = sum(
        module.q_proj.out_features for module in model.modules() if hasattr(module, "q_proj")
    )
    assert (
        flops_per_token(weights, Architecture.of(fields, "test"), seq)
        == 6 * weights + 2 * 2 * 3 * seq * queries
    )


def test_llama_3_8b_is_what_meta_published() -> None:
    model = meta_model(fields_of("llama3_8b"))
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == 8_030_261_248
    embedding, norms = 128_256 * 4096, 65 * 4096
    expected = 6 * (parameters - embedding - norms) + 12 * 32 * 4096 * 8192
    numbers = Architecture.of(fields_of("llama3_8b"), "test")
    weights = parameters - embedding - norms
    flops = flops_per_token(weights, numbers, 8192)
    causal = flops_per_token(weights, numbers, 8192, causal=True)
    assert (flops, causal) == (expected, expected - 6 * 32 * 4096 * 8192)
    assert (
        mfu(10_000, flops, 989e12) == pytest.approx(10_000 * expected / 989e12)
        and mfu(10_000, flops, None) is None
    )


def test_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
        "NVIDIA A10G": 70e12,
        "NVIDIA B200": 2250e12,
        "Tesla T4": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak, name
    assert peak_flops(torch.device("cpu")) is None
    assert all(1e13 < peak < 1e16 for peak in PEAK_FLOPS.values())


def test_memory_on_cpu_is_this_process() -> None:
    assert 0.01 < peak_memory_gib(torch.device("cpu")) < 1000


def test_the_optimal_interval_loses_the_least() -> None:
    """Pauses and the half interval that a failure costs on average, in a year: Young's interval
    against others.
    """
    pause, between = 0.8, 24 * 3600.0

    def lost(interval: float) -> float:
        return pause / interval + interval / 2 / between

    best = optimal_interval([5.0, 0.7, 0.8, 0.9], between)  # the first one plans as well
    assert all(lost(best) <= lost(best * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))
    assert optimal_interval([0.8], between) == best and pause / best < 0.005
