"""Decay groups and the learning rate, at points worked out by hand."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tp_trainer.config import Optim, ResolvedOptim
from tp_trainer.optim import Schedule, build_optimizer, learning_rate, set_learning_rate
from tp_trainer.parameters import ParameterGroups


def rates(total: int, lr: float = 1.0, **fields: Any) -> list[float]:
    schedule = Schedule.of(Optim(**{"min_lr_ratio": 0.1, "warmup_steps": 4, **fields}), total)
    return [learning_rate(schedule, lr, step) for step in range(total)]


WARM = [0.25, 0.5, 0.75, 1.0]  # the first step already learns, the fourth has the peak


def test_cosine() -> None:
    got = rates(13, schedule="cosine")
    assert got[:4] == pytest.approx(WARM)
    # 9 steps from the peak (step 4) to the end (step 12): a quarter of the way is step 6, half is
    # step 8
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
    # 5 decaying steps, the first still at the peak
    assert got == pytest.approx(WARM + [1.0] * 12 + [0.775, 0.55, 0.325, 0.1])
    # null = 10 % of the run
    assert rates(20, schedule="wsd")[16:] == pytest.approx([1.0, 1.0, 1.0, 0.1])


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


# ------------------------------------------------------------------------------------------- runs m


def extended(optim: Optim, lengths: list[tuple[int, int]]) -> list[float]:
    """The rates of a run that is told another length, again and again: (steps done until then, all
    steps from then on).
    """
    schedule = Schedule.of(optim, lengths[0][1])
    got: list[float] = []
    for (_, total), (until, _) in zip(lengths, [*lengths[1:], lengths[-1][::-1]], strict=True):
        stored = Schedule.stored(json.loads(json.dumps(asdict(schedule))))
        assert stored is not None
        schedule = stored.resumed(optim, len(got), total)
        got += [learning_rate(schedule, 1.0, step) for step in range(len(got), until)]
    return got


ROOT = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("fields", "lengths", "expected"),
    [
        # (warm-up 2, floor 0.1); linear, of 11 steps: 1 at step 2, down by 0.1125 a step, 0.55 at
        # step 6; then 4 steps to 0.1 at step 10
        ({"schedule": "linear"}, [(0, 11), (6, 11)], {2: 1, 6: 0.55, 8: 0.325, 10: 0.1}),
        ({"schedule": "linear"}, [(0, 11), (6, 15)], {6: 0.55, 10: 0.325, 14: 0.1}),
        ({"schedule": "linear"}, [(0, 11), (6, 9)], {6: 0.55, 7: 0.325, 8: 0.1}),
        ({"schedule": "linear"}, [(0, 11), (11, 15)], {10: 0.1, 11: 0.1, 14: 0.1}),
        (
            {"schedule": "linear"},
            [(0, 11), (6, 15), (10, 19)],
            {6: 0.55, 10: 0.325, 14: 0.2125, 18: 0.1},
        ),
        ({"schedule": "linear"}, [(0, 11), (6, 15), (6, 11)], {6: 0.55, 8: 0.325, 10: 0.1}),
        # the warm-up of 40 steps
        (
            {"schedule": "linear", "warmup_steps": None},
            [(0, 40), (1, 80)],
            {0: 0.5, 1: 1, 2: 1, 79: 0.1},
        ),
        (
            {"schedule": "linear", "warmup_steps": 4},
            [(0, 11), (2, 21)],
            {0: 0.25, 1: 0.5, 2: 0.75, 3: 1, 4: 1, 12: 0.55, 20: 0.1},
        ),
        # cosine: half-way at step 6 of 11; from there 0.1 + 0.45 * (1 + cos)/2
        (
            {"schedule": "cosine"},
            [(0, 11), (6, 15)],
            {6: 0.55, 8: 0.1 + 0.225 * (1 + ROOT), 10: 0.325, 14: 0.1},
        ),
        ({"schedule": "constant"}, [(0, 11), (6, 15)], {2: 1, 6: 1, 14: 1}),
        # wsd, 3 of 11 decaying (8, 9, 10: 1, 0.55, 0.1): told in time, they come later; in the
        # decay the rate is held until they come
        (
            {"schedule": "wsd", "decay_steps": 3},
            [(0, 11), (6, 15)],
            {6: 1, 8: 1, 12: 1, 13: 0.55, 14: 0.1},
        ),
        (
            {"schedule": "wsd", "decay_steps": 3},
            [(0, 11), (9, 15)],
            {8: 1, 9: 0.55, 12: 0.55, 13: 0.325, 14: 0.1},
        ),
        ({"schedule": "wsd", "decay_steps": 3}, [(0, 21), (6, 9)], {6: 1, 7: 0.55, 8: 0.1}),
        # 10 % are 6 of 60
        (
            {"schedule": "wsd", "decay_steps": None},
            [(0, 30), (10, 60)],
            {10: 1, 54: 1, 56: 0.64, 59: 0.1},
        ),
    ],
)
def test_another_length_at_a_resume(
    fields: dict[str, Any], lengths: list[tuple[int, int]], expected: dict[int, float]
) -> None:
    optim = Optim(**{"min_lr_ratio": 0.1, "warmup_steps": 2, **fields})
    got = extended(optim, lengths)
    assert {step: got[step] for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("warmup", [None, 0, 7])
@pytest.mark.parametrize("decay", [None, 9])
def test_no_resume_lets_the_rate_jump(schedule: str, warmup: int | None, decay: int | None) -> None:
    optim = Optim(schedule=schedule, warmup_steps=warmup, decay_steps=decay, min_lr_ratio=0.1)
    draw = random.Random(f"{schedule} {warmup} {decay}")
    for _ in range(200):
        lengths = [(0, draw.randint(20, 200))]
        for _ in range(draw.randint(1, 3)):
            done = draw.randint(lengths[-1][0], lengths[-1][1])
            lengths.append((done, done + draw.randint(10, 300)))
        got, unbroken = extended(optim, lengths), Schedule.of(optim, lengths[0][1])
        first = lengths[1][0]
        assert got[:first] == [learning_rate(unbroken, 1.0, step) for step in range(first)], lengths
        assert got[first] == pytest.approx(learning_rate(unbroken, 1.0, first)), (
            "the resumed step has the unbroken run's rate"
        )
        top = max(unbroken.warmup - 1, 0)
        assert all(
            later <= now + 1e-12 for now, later in zip(got[top:], got[top + 1 :], strict=False)
        ), "it never rises again"
        assert schedule == "constant" or got[-1] == pytest.approx(0.1)


def test_the_same_length_again_changes_no_bit() -> None:
    optim = Optim(warmup_steps=None)
    once = Schedule.of(optim, 300).resumed(optim, 170, 477)
    for step in range(170, 478):
        again = Schedule.stored(json.loads(json.dumps(asdict(once))))
        assert again is not None and again.resumed(optim, step, 477) == once
    assert Schedule.stored(None) is None and Schedule.stored({**asdict(once), "total": "x"}) is None


def test_no_weight_decay_on_norms_and_biases() -> None:
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attention_bias=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = build_optimizer(
        ResolvedOptim(lr=1e-3, weight_decay=0.3, betas=[0.8, 0.9], eps=1e-7),
        ParameterGroups.of(model),
    )
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert (
        sum(len(group["params"]) for group in optimizer.param_groups)
        == len(decay)
        == len(list(model.parameters()))
    )
    free = {
        name.removeprefix("model.layers.0.")
        for name, p in model.named_parameters()
        if decay[id(p)] == 0.0
    }
    assert free == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "model.norm.weight",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
        "self_attn.q_proj.bias",
        "self_attn.k_proj.bias",
        "self_attn.v_proj.bias",
        "self_attn.o_proj.bias",
    }
    assert {
        decay[id(p)]
        for name, p in model.named_parameters()
        if name.removeprefix("model.layers.0.") not in free
    } == {0.3}
    assert all(
        group["betas"] == (0.8, 0.9) and group["eps"] == 1e-7 and group["fused"]
        for group in optimizer.param_groups
    )


def test_learning_rate_reaches_every_group() -> None:
    parameters = ParameterGroups(
        matrix={"a": torch.nn.Parameter(torch.ones(2, 2))},
        vector={"b": torch.nn.Parameter(torch.ones(2))},
    )
    optimizer = build_optimizer(ResolvedOptim(lr=1.0), parameters)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_the_state_is_there_before_the_first_step() -> None:
    """Where it is made later, it lies scattered among activations; and it is what torch's own AdamW
    makes.
    """
    matrix = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = build_optimizer(ResolvedOptim(lr=0.1), ParameterGroups(matrix={"matrix": matrix}))
    made = {key: value.clone() for key, value in optimizer.state[matrix].items()}
    assert set(made) == {"step", "exp_avg", "exp_avg_sq"} and not any(
        value.any() for value in made.values()
    )
    twin = torch.nn.Parameter(matrix.detach().clone())
    theirs = torch.optim.AdamW(
        [twin], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8, fused=True
    )
    for _ in range(3):
        matrix.grad, twin.grad = torch.ones(3, 4), torch.ones(3, 4)
        optimizer.step()
        theirs.step()
    assert torch.equal(matrix, twin)
    assert {key: value.dtype for key, value in made.items()} == {
        key: value.dtype for key, value in theirs.state[twin].items()
    }
