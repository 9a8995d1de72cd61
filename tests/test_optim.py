"""Decay groups and the learning rate, at points worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tp_trainer.config import Optim
from tp_trainer.optim import build_optimizer, learning_rate, set_learning_rate


def rates(total: int, **fields: Any) -> list[float]:
    optim = Optim(**{"lr": 1.0, "min_lr_ratio": 0.1, "warmup_steps": 4, **fields})
    return [learning_rate(optim, step, total) for step in range(total)]


WARM = [0.25, 0.5, 0.75, 1.0]  # the first step already learns, the fourth has the peak


def test_cosine() -> None:
    got = rates(13, schedule="cosine")
    assert got[:4] == pytest.approx(WARM)
    # 9 steps from the peak (step 4) to the end (step 12): a quarter of the way is step 6, half is step 8
    assert got[4] == pytest.approx(1.0)
    assert got[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5)))
    assert got[8] == pytest.approx(0.55)
    assert got[12] == pytest.approx(0.1)


def test_linear() -> None:
    got = rates(13, schedule="linear")
    assert got[:4] == pytest.approx(WARM)
    assert [got[4], got[6], got[8], got[12]] == pytest.approx([1.0, 0.775, 0.55, 0.1])


def test_constant() -> None:
    assert rates(13, schedule="constant") == pytest.approx(WARM + [1.0] * 9)


def test_warmup_stable_decay() -> None:
    got = rates(20, schedule="wsd", decay_steps=5)
    assert got == pytest.approx(WARM + [1.0] * 12 + [0.775, 0.55, 0.325, 0.1])  # 5 decaying steps, the first still at the peak
    assert rates(20, schedule="wsd")[16:] == pytest.approx([1.0, 1.0, 1.0, 0.1])  # null = 10 % of the run


def test_warmup_by_default_is_a_twentieth_of_the_run() -> None:
    got = rates(100, schedule="constant", warmup_steps=None)
    assert got[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates(10, schedule="constant", warmup_steps=None)[0] == 1.0


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 40, 101])
@pytest.mark.parametrize("warmup", [None, 0, 1, 2])
def test_bounds(schedule: str, total: int, warmup: int | None) -> None:
    if warmup is not None and warmup > total:
        return  # refused by config
    got = rates(total, lr=3e-4, schedule=schedule, warmup_steps=warmup)
    assert all(0 < lr <= 3e-4 for lr in got)
    after = got[warmup if warmup is not None else total // 20 :]
    assert after == sorted(after, reverse=True)
    if schedule != "constant" and len(after) >= 2 and not (schedule == "wsd" and total < 20):
        assert got[-1] == pytest.approx(0.1 * 3e-4)


def test_no_weight_decay_on_norms_and_biases() -> None:
    config = AutoConfig.for_model(
        "qwen3", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attention_bias=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    optimizer = build_optimizer(Optim(lr=1e-3, weight_decay=0.3, betas=[0.8, 0.9], eps=1e-7), model.named_parameters())
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decay) == len(list(model.parameters()))
    free = {name.removeprefix("model.layers.0.") for name, p in model.named_parameters() if decay[id(p)] == 0.0}
    assert free == {
        "input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight",
        "self_attn.q_norm.weight", "self_attn.k_norm.weight",
        "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias", "self_attn.o_proj.bias",
    }  # fmt: skip
    assert {decay[id(p)] for name, p in model.named_parameters() if name.removeprefix("model.layers.0.") not in free} == {0.3}
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-7 and group["fused"] for group in optimizer.param_groups)


def test_learning_rate_reaches_every_group() -> None:
    parameters = [("a", torch.nn.Parameter(torch.ones(2, 2))), ("b", torch.nn.Parameter(torch.ones(2)))]
    optimizer = build_optimizer(Optim(lr=1.0), parameters)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_the_state_is_there_before_the_first_step() -> None:
    """Where it is made later, it lies scattered among activations; and it is what torch's own AdamW makes."""
    matrix = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = build_optimizer(Optim(lr=0.1), [("matrix", matrix)])
    made = {key: value.clone() for key, value in optimizer.state[matrix].items()}
    assert set(made) == {"step", "exp_avg", "exp_avg_sq"} and not any(value.any() for value in made.values())
    twin = torch.nn.Parameter(matrix.detach().clone())
    theirs = torch.optim.AdamW([twin], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8, fused=True)
    for _ in range(3):
        matrix.grad, twin.grad = torch.ones(3, 4), torch.ones(3, 4)
        optimizer.step()
        theirs.step()
    assert torch.equal(matrix, twin)
    assert {key: value.dtype for key, value in made.items()} == {key: value.dtype for key, value in theirs.state[twin].items()}
