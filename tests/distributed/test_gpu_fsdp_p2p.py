"""FSDP2's exchange without copies on GPUs, called and replayed, against FSDP2's own."""

from __future__ import annotations

import faulthandler
import gc
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from gpu_ranks import SIZE, spawn
from plain_reference import FAMILIES, settings_of
from rank_cases import trainer

from tp_trainer.loop import evaluate
from tp_trainer.parallel.fast import fsdp_p2p

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(SIZE < 2, reason="needs two GPUs")]
# wide enough for a block's exchange to take as long as its matmuls
WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 6,
}
WAYS: list[dict[str, Any]] = [
    {},
    {"cuda_graphs": False},
    {"activation_checkpointing": "full"},
    {"reshard_after_forward": False},
]


def steps(device: torch.device, parallelism: dict[str, Any]) -> list[float]:
    torch._dynamo.reset()
    dp = parallelism["dp"]
    settings = settings_of(
        {**FAMILIES["llama"], **WIDE},
        parallelism=parallelism,
        optim={"lr": 1e-4},
        cluster={"device": "gpu"},
        train={"micro_batch_size": 2, "global_batch_size": 4 * dp, "eval_batches": 1},
    )
    made, out = trainer(settings, device), list[float]()
    with (
        closing(made.model),
        mock.patch.object(fsdp_p2p, "add_up", side_effect=fsdp_p2p.add_up) as added,
    ):
        for number in range(8):
            out += made.step()
            if number % 3 == 2:
                out.append(evaluate(made.model, made.data.evaluation(), made.mesh))
        assert added.called is parallelism["direct_fsdp"]
        assert bool(made.model.graphs and made.model.graphs.graphs) is (
            parallelism.get("cuda_graphs") is None
        )
    del made
    gc.collect()  # or the models of all ways are held, some 5 GiB each
    return out


def on_a_rank(device: torch.device, layout: dict[str, Any]) -> None:
    faulthandler.dump_traceback_later(600, exit=True)  # ranks that wait for one another say where
    for dtype, tolerance, ways in (("float32", 1e-5, WAYS[:1]), ("bfloat16", 2e-3, WAYS)):
        base = {**layout, "param_dtype": dtype}
        expected = steps(device, {**base, "cuda_graphs": False, "direct_fsdp": False})
        for way in ways:
            given = steps(device, {**base, "direct_fsdp": True, **way})
            assert given == pytest.approx(expected, rel=tolerance), (dtype, way)
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("layout", [{"tp": 1}, {"tp": 2}, {"tp": 1, "dp_replicate": 2}], ids=str)
def test_steps_are_those_of_fsdp2(tmp_path: Path, layout: dict[str, Any]) -> None:
    if SIZE % 4 and layout != {"tp": 1}:
        pytest.skip("needs four GPUs")
    spawn(on_a_rank, tmp_path / "store", {**layout, "dp": SIZE // layout["tp"]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_in_float32(dtype: torch.dtype) -> None:
    for count in (1, 5, 100_001):
        pieces = torch.randn(4, count, device="cuda").to(dtype)
        out = torch.empty(count, device="cuda")
        for rank in (0, 2, 3):
            fsdp_p2p.add_up(
                out, pieces[rank], torch.cat((pieces[:rank], pieces[rank + 1 :])), rank, 0.25
            )
            torch.testing.assert_close(
                out.double(), pieces.double().sum(0) / 4, rtol=1e-6, atol=1e-6
            )
