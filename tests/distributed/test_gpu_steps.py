"""Steps on a GPU: replayed ones are the same steps, and the optimizer's kernel is AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_reference import FAMILIES, settings_of
from rank_cases import trainer

from tp_trainer.loop import evaluate
from tp_trainer.optim.adamw import AdamW
from tp_trainer.parallel.fast import gradient_copies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("world") / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    torch.cuda.set_device(DEVICE)
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    dist.destroy_process_group()


def steps(dtype: str, micro_batches: int, **parallelism: Any) -> dict[str, Any]:
    """Eight steps, an evaluation after each second one; and how many graphs there were."""
    torch._dynamo.reset()
    settings = settings_of(
        FAMILIES["llama"],
        parallelism={"tp": 1, "dp": 1, "param_dtype": dtype, **parallelism},
        train={"micro_batch_size": 2, "global_batch_size": 2 * micro_batches, "eval_batches": 1},
        optim={"lr": 1e-2},
        cluster={"device": "gpu"},
    )
    made = trainer(settings, DEVICE)
    out: dict[str, Any] = {"losses": [], "norms": [], "evaluations": []}
    with closing(made.model):
        for number in range(8):
            loss, norm = made.step()
            out["losses"].append(loss)
            out["norms"].append(norm)
            if number % 2:
                out["evaluations"].append(evaluate(made.model, made.data.evaluation(), made.mesh))
        out["graphs"] = len(made.model.graphs.graphs) if made.model.graphs else 0
    return out


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_replayed_steps_are_the_same_steps(micro_batches: int) -> None:
    replayed, called = (
        steps("float32", micro_batches),
        steps("float32", micro_batches, cuda_graphs=False),
    )
    assert (replayed.pop("graphs"), called.pop("graphs")) == (min(micro_batches, 2), 0)
    assert called["norms"][-1] < 0.6 * called["norms"][0], "the steps change something"
    for key, expected in called.items():
        assert replayed[key] == pytest.approx(expected, rel=1e-4), key


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_in_bfloat16_the_steps_go_the_same_way(micro_batches: int) -> None:
    low, full = steps("bfloat16", micro_batches), steps("float32", micro_batches)
    for key, tolerance in (("losses", 5e-3), ("evaluations", 5e-3), ("norms", 5e-2)):
        assert low[key] == pytest.approx(full[key], rel=tolerance), key


def test_the_kernel_is_adamw() -> None:
    torch.manual_seed(0)
    ours = [
        torch.nn.Parameter(torch.randn(size, device=DEVICE))
        for size in ((50, 100), (2048,), (7,), (0,))
    ]
    theirs = [torch.nn.Parameter(each.detach().clone()) for each in ours]
    for each in ours[:2]:
        each.compute_copy = torch.zeros_like(each, dtype=torch.bfloat16)  # type: ignore[attr-defined]
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    one, other = AdamW(ours, fused=True, **options), torch.optim.AdamW(theirs, **options)
    one.allocate()
    for number in range(10):
        skipped = number == 4
        one.grad_scale, one.found_inf = (
            torch.tensor(2.0, device=DEVICE),
            torch.tensor(float(skipped), device=DEVICE),
        )
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad / 2
        one.step()
        if not skipped:
            other.step()
    assert one.wrote_copies
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                one.state[a][key].cpu(), other.state[b][key].cpu(), rtol=1e-5, atol=1e-6
            )
    for each in ours[:2]:
        assert torch.equal(each.compute_copy, each.detach().to(torch.bfloat16))  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_copied_as_torch_does(dtype: torch.dtype) -> None:
    """Even ones by our kernel; uneven and strided ones are torch's."""
    for shapes in ([(6, 50), (4000,), (2, 3, 700)], [(6, 50), (5, 3)]):
        given = [torch.randn(shape, device=DEVICE).bfloat16() for shape in shapes]
        width = sum(-(-each.shape[0] // 2) * each[0].numel() for each in given)
        ours, theirs = (torch.full((2, width), 7.0, dtype=dtype, device=DEVICE) for _ in range(2))
        gradient_copies.install()
        torch.ops.fsdp.chunk_cat(given, dim=0, num_chunks=2, out=ours)
        torch._chunk_cat(given, 0, 2, out=theirs)
        assert torch.equal(ours, theirs)
