"""Matmuls in float8: what is multiplied, how far off it is, that training goes the same way."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from plain_reference import FAMILIES, settings_of
from rank_cases import NEEDS_COMPILER, Watch, exchanges_of_graphs, trainer
from rank_pool import RankPool
from scaled_mm import NEEDS_SCALED_MM, scaled_mm_in_float32

from tp_trainer.parallel.collectives import _Scatter
from tp_trainer.parallel.fast import float8

# rows, and with tp 4 each rank's features, are multiples of 16
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def restored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    low, scale = float8.quantised(x, dtype)
    return low.double() * scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])]
)
def test_products_are_those_of_the_rounded_matrices(device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = ((2, 32, 64), (96, 64), (96,), (2, 32, 96))
    x, weight, bias, gradient = (
        torch.randn(size, dtype=dtype, device=device, requires_grad=True) for size in sizes
    )
    scaled = (weight * 1e-3).detach().requires_grad_()  # far below what float8 has without a scale
    out = float8.linear(x, scaled, bias)
    out.backward(gradient)
    low_x, low_weight = (
        restored(x.detach(), torch.float8_e4m3fn),
        restored(scaled.detach(), torch.float8_e4m3fn),
    )
    low_gradient = restored(gradient.detach(), torch.float8_e5m2)
    exact = device == "cpu" and dtype == torch.float32  # GPUs add up with fewer bits
    rounding = 1e-5 if exact else 1e-2
    torch.testing.assert_close(
        out.double(), low_x @ low_weight.t() + bias.double(), rtol=rounding, atol=rounding
    )
    torch.testing.assert_close(x.grad.double(), low_gradient @ low_weight, rtol=1e-2, atol=1e-4)  # type: ignore[union-attr]
    expected = low_gradient.flatten(0, 1).t() @ low_x.flatten(0, 1)
    assert scaled.grad is not None
    atol = 1e-4 if exact else 1e-1
    torch.testing.assert_close(scaled.grad.double(), expected, rtol=1e-2, atol=atol)
    torch.testing.assert_close(bias.grad, gradient.sum((0, 1)).to(dtype), rtol=1e-2, atol=1e-1)
    whole = F.linear(x.double(), scaled.double())
    assert 0.01 < ((float8.linear(x, scaled, None) - whole).norm() / whole.norm()).item() < 0.06, (
        "three bits of mantissa"
    )


def test_each_matrix_is_looked_through_once() -> None:
    x, weight = torch.randn(32, 64, requires_grad=True), torch.randn(96, 64, requires_grad=True)
    with mock.patch.object(float8, "scale_of", side_effect=float8.scale_of) as looked:
        float8.linear(x, weight, None).sum().backward()
    assert [call.args[0].shape for call in looked.call_args_list] == [
        x.shape,
        weight.shape,
        (32, 96),
    ]


def test_scales_never_overflow_and_zeros_stay() -> None:
    for dtype in (float8.FORWARD, float8.BACKWARD):
        for factor in (1e-30, 1e-4, 1.0, 1e6, 1e30):
            x = torch.tensor([-1.0, 0.3, 0.0, 1.0]) * factor
            assert torch.isfinite(restored(x, dtype)).all()
            assert restored(x, dtype)[2] == 0
            if factor > 1e-12:
                torch.testing.assert_close(restored(x, dtype), x.double(), rtol=0.13, atol=0)


@NEEDS_SCALED_MM
def test_the_product_is_torchs() -> None:
    a, b = (
        float8.quantised(torch.randn(32, 64), float8.BACKWARD),
        float8.quantised(torch.randn(48, 64) * 1e-3, float8.FORWARD),
    )
    for dtype in (torch.float32, torch.bfloat16):
        given = torch._scaled_mm(a[0], b[0].t(), scale_a=a[1], scale_b=b[1], out_dtype=dtype)
        torch.testing.assert_close(float8.matmul(*a, *b, dtype), given)


def test_other_sizes_stay_as_they_are() -> None:
    with mock.patch.object(float8, "matmul", side_effect=float8.matmul) as multiplied:
        for rows, inner, columns in ((15, 32, 32), (16, 24, 32), (16, 32, 40)):
            x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
            assert torch.equal(float8.linear(x, weight, None), F.linear(x, weight))
        assert not multiplied.called
        float8.linear(torch.randn(16, 32), torch.randn(32, 32), None)
        assert multiplied.call_count == 1


def steps(parallelism: dict[str, Any]) -> tuple[list[float], list[float], int]:
    """Five steps of one micro-batch."""
    settings = settings_of(
        {**FAMILIES["llama"], **SIZES},
        parallelism=parallelism,
        optim={"lr": 3e-3},
        data={"seq_length": 32},
        train={"micro_batch_size": 1, "global_batch_size": parallelism["dp"]},
    )
    made = trainer(settings)
    if made.config.parallelism.compile:  # the compiler would end a graph at what counts
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        losses, norms = zip(*(made.step() for _ in range(5)), strict=True)
        assert not torch._dynamo.utils.counters["graph_break"]
        return list(losses), list(norms), torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with mock.patch.object(float8, "matmul", side_effect=float8.matmul) as multiplied:
        losses, norms = zip(*(made.step() for _ in range(5)), strict=True)
        return list(losses), list(norms), multiplied.call_count // 5


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "parallelism",
    [
        {"tp": 1, "dp": 1},
        {"tp": 2, "dp": 2},
        {"tp": 4, "dp": 1},
        {"tp": 2, "dp": 1, "compile": True},
        {"tp": 1, "dp": 2, "activation_checkpointing": "selective"},
    ],
    ids=str,
)
def test_training_goes_the_same_way(ranks: RankPool, parallelism: dict[str, Any]) -> None:
    parallelism = {**parallelism, "param_dtype": "bfloat16"}
    world = parallelism["tp"] * parallelism["dp"]
    losses, norms, graphs = ranks.run(world, steps, parallelism)[0]
    low_losses, low_norms, matmuls = ranks.run(world, steps, {**parallelism, "float8": True})[0]
    assert norms[-1] < 0.9 * norms[0], "the steps change something"
    assert low_losses != losses and low_losses == pytest.approx(losses, rel=1e-2)
    assert low_norms == pytest.approx(norms, rel=0.1)
    if "compile" in parallelism:
        assert matmuls == graphs > 0, "no graph more than without"
    elif "activation_checkpointing" not in parallelism:
        assert matmuls == 3 * 7 * FAMILIES["llama"]["num_hidden_layers"], (
            "each of a block's seven linears three times"
        )


def gathered(in_float8: bool, parallelism: dict[str, Any]) -> tuple[list[float], int]:
    """Losses and gradient norms of three steps, and the bytes of the third's all-gathers."""

    def separately(x: torch.Tensor, weight: torch.Tensor, group: str, size: int) -> torch.Tensor:
        out = float8.linear(x, weight, None)
        return _Scatter.apply(out.reshape(size, -1, out.shape[-1]), group, size)

    settings = settings_of(
        {**FAMILIES["llama"], **SIZES},
        parallelism={**parallelism, "float8": True},
        optim={"lr": 3e-3},
        data={"seq_length": 32},
        train={"micro_batch_size": 1, "global_batch_size": 1},
    )
    nbytes = list[int]()
    watch = Watch(
        lambda name, outputs: nbytes.extend(
            each.nbytes for each in outputs if "all_gather_into_tensor" in name
        )
    )
    with ExitStack() as stack:
        if not in_float8:
            stack.enter_context(mock.patch.object(float8, "_in_float8", return_value=False))
            stack.enter_context(
                mock.patch.object(float8, "linear_and_leave", side_effect=separately)
            )
        made = trainer(settings)
        numbers = [number for _ in range(2) for number in made.step()]
        with watch:
            numbers += made.step()
    return numbers, sum(nbytes)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_rows_are_gathered_in_float8_and_nothing_changes(ranks: RankPool, tp: int) -> None:
    parallelism = {"tp": tp, "dp": 1, "param_dtype": "bfloat16"}
    (given, few), (expected, many) = (
        ranks.run(tp, gathered, way, parallelism)[0] for way in (True, False)
    )
    assert given == expected, "to the last bit"
    # two regions, forward and backward
    blocks = 4 * 32 * SIZES["hidden_size"] * FAMILIES["llama"]["num_hidden_layers"]
    assert many - few == blocks, "a byte an element instead of two"


def beside(
    parallelism: dict[str, Any], family: str
) -> tuple[tuple[float, float], list[Counter[str]]]:
    """Loss and gradient norm of a step, and the exchanges in each graph, forward and backward."""

    def as_on_gpus(
        a: torch.Tensor,
        scale_a: torch.Tensor,
        b: torch.Tensor,
        scale_b: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)

    architecture = {**FAMILIES[family], **SIZES, "num_hidden_layers": 1}
    settings = settings_of(
        architecture,
        parallelism={**parallelism, "float8": True},
        data={"seq_length": 32},
        train={"micro_batch_size": 1, "global_batch_size": parallelism["dp"]},
    )
    if "compile" not in parallelism:
        return trainer(settings).step(), []
    with (
        exchanges_of_graphs() as found,
        mock.patch.object(float8, "matmul", as_on_gpus),
        scaled_mm_in_float32(),
    ):
        return trainer(settings).step(), found


@pytest.mark.sampled(2)
@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("family", "parallelism", "left"),
    # fused ones gather outputs too
    [("qwen2", {"tp": 2, "dp": 2}, 0), ("phi3", {"tp": 2, "dp": 1}, 2)],
    ids=str,
)
def test_products_go_on_beside_the_exchange(
    ranks: RankPool, family: str, parallelism: dict[str, int], left: int
) -> None:
    world = parallelism["tp"] * parallelism["dp"]
    expected, _ = ranks.run(world, beside, parallelism, family)[0]
    given, (forward, backward) = ranks.run(
        world, beside, {**parallelism, "compile": True, "async_tp": True}, family
    )[0]
    both = Counter(
        all_gather_matmul=2, matmul_reduce_scatter=2, all_reduce=2
    )  # of the largest element
    assert forward == both + Counter(all_gather_into_tensor=left) and backward == both + Counter(
        reduce_scatter_tensor=left
    )
    assert given[0] == pytest.approx(expected[0], rel=1e-6)
    assert given[1] == pytest.approx(expected[1], rel=1e-3)  # of elements between two numbers
