"""One optimizer step: accumulation, the mean over label tokens, recomputation, compile,
collectives.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import compare
from plain_reference import (
    FAMILIES,
    Reference,
    data_of,
    global_batches,
    mask_labels,
    plain_model,
    saved,
    settings_of,
)
from rank_cases import (
    NEEDS_COMPILER,
    Watch,
    count_operations,
    exchanges_of_graphs,
    passes_run,
    run_steps,
    trainer,
)
from rank_pool import RankPool
from torch.distributed.tensor import DTensor

from tp_trainer.data import Cursor
from tp_trainer.parallel.fast import overlap


@pytest.mark.parametrize("micro", [2, 8])
def test_accumulation_is_one_large_batch(ranks: RankPool, models: Path, micro: int) -> None:
    train = {"global_batch_size": 16, "micro_batch_size": micro, "clip_grad_norm": 0.5}
    settings = settings_of(saved(models, "qwen2"), parallelism={"tp": 1, "dp": 2}, train=train)
    assert len(data_of(settings, 0, 2).step(Cursor())[0]) == 8 // micro
    compare(
        ranks.run(2, run_steps, settings, 3), Reference(settings).run(global_batches(settings, 3))
    )


def test_loss_is_the_mean_over_labels_wherever_they_lie(ranks: RankPool, models: Path) -> None:
    settings = settings_of(
        saved(models, "qwen2"), 2, 2, train={"micro_batch_size": 1, "global_batch_size": 8}
    )
    batches = [
        (inputs, mask_labels(inputs, labels)) for inputs, labels in global_batches(settings, 4)
    ]
    rows = [(labels != -100).sum(1) for _, labels in batches]
    assert any(0 in row for row in rows), "no micro-batch without labels"
    assert any(row[0::2].sum() != row[1::2].sum() for row in rows), "ranks hold equally many labels"
    compare(ranks.run(4, run_steps, settings, 4, True), Reference(settings).run(batches))


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_recomputation_changes_no_number(ranks: RankPool, models: Path, kind: str) -> None:
    settings = settings_of(
        saved(models, "qwen2"), parallelism={"tp": 2, "dp": 2, "activation_checkpointing": kind}
    )
    compare(
        ranks.run(4, run_steps, settings, 3), Reference(settings).run(global_batches(settings, 3))
    )


def one_micro_batch(settings: dict[str, Any]) -> dict[str, Any]:
    """What a forward and a backward pass of one micro-batch do."""
    made = trainer(settings)
    calls: list[int] = []
    for layer in made.model.module.model.layers:
        layer.mlp.act_fn.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = made.data.step(Cursor())[0][0]
    forward, watch_forward = count_operations()
    backward, watch_backward = count_operations()
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with watch_forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = made.model.module(*batch.tensors)
    calls_forward = len(calls)
    with watch_backward:
        loss.backward()
    gradients = [p.grad.to_local().clone() for p in made.model.parameters]
    return {
        "calls": (calls_forward, len(calls)),
        "kept": kept,
        "forward": forward,
        "backward": backward,
        "gradients": gradients,
    }


def matmuls(counts: dict[str, int]) -> int:
    return counts["aten.mm.default"] + counts["aten.addmm.default"]


def test_what_is_recomputed(ranks: RankPool, models: Path) -> None:
    got = {}
    for kind in ("none", "selective", "full"):
        parallelism = {"tp": 2, "dp": 2, "activation_checkpointing": kind}
        got[kind] = ranks.run(
            4, one_micro_batch, settings_of(saved(models, "qwen2_dropout"), parallelism=parallelism)
        )[0]
    none, selective, full = got["none"], got["selective"], got["full"]
    # 2 layers
    assert none["calls"] == (2, 2) and selective["calls"] == (2, 4) and full["calls"] == (2, 4)
    assert full["kept"] < 0.5 * none["kept"]
    # the last matmul of a layer isn't needed again
    assert matmuls(full["backward"]) == matmuls(none["backward"]) + 2 * 7 - 2
    assert matmuls(selective["backward"]) == matmuls(none["backward"])
    scatters = "_c10d_functional.reduce_scatter_tensor.default"
    assert (
        selective["backward"][scatters] == none["backward"][scatters] < full["backward"][scatters]
    )
    for kind in ("selective", "full"):  # with dropout: the same draws again
        assert all(
            torch.equal(a, b)
            for a, b in zip(none["gradients"], got[kind]["gradients"], strict=True)
        )


def compiled_steps(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """What `run_steps` gives; besides how many graphs there were, and the order of matmuls and
    collectives in each one's code.
    """
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    defer_matmuls, orders = overlap.defer_matmuls, []

    def seen(nodes: list[Any]) -> list[Any]:
        nodes = defer_matmuls(nodes)
        orders.append(
            [
                str(name).rpartition(".")[2]
                for node in nodes
                if (name := overlap._operation(node)) is not None
            ]
        )
        return nodes

    with pytest.MonkeyPatch.context() as patch, passes_run():
        patch.setattr(overlap, "defer_matmuls", seen)
        out = run_steps(settings, steps)
    out["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    out["orders"] = orders
    torch._dynamo.reset()
    return out


@pytest.mark.slow
@NEEDS_COMPILER
def test_compile_changes_no_number(ranks: RankPool, models: Path) -> None:
    settings = settings_of(saved(models, "qwen2"), parallelism={"tp": 2, "dp": 1, "compile": True})
    results = ranks.run(2, compiled_steps, settings, 3)
    assert results[0]["graphs"] >= 1
    # each linear layer's two
    backward = next(order for order in results[0]["orders"] if order.count("mm") == 2 * 7)
    assert {"reduce_scatter_tensor", "mm", "wait_tensor"} <= set(backward)
    begun = [i for i, name in enumerate(backward) if name == "reduce_scatter_tensor"]
    assert len(begun) == 2 and all(backward[i + 1] == "mm" for i in begun), (
        "a weight's gradient is formed while it is under way"
    )
    alone = [
        i
        for i, name in enumerate(backward[:-1])
        if name.endswith("_tensor") and backward[i + 1] == "wait_tensor"
    ]
    assert len(alone) == 2, (
        "the gathers: no matmul is due there, with tensors as small as these all have been done"
    )
    compare(results, Reference(settings).run(global_batches(settings, 3)))


def rewritten_steps(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """What `run_steps` gives; besides the exchanges in each graph."""
    with exchanges_of_graphs() as found:
        return {**run_steps(settings, steps), "exchanges": found}


@NEEDS_COMPILER
@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("family", "tp", "left"),
    # biases; two views of what is gathered; fused ones gather their outputs too
    [("qwen2", 2, 0), ("llama", 4, 0), ("phi3", 2, 2)],
)
def test_exchange_and_products_become_one(
    ranks: RankPool, models: Path, family: str, tp: int, left: int
) -> None:
    settings = settings_of(
        saved(models, family), parallelism={"tp": tp, "dp": 1, "compile": True, "async_tp": True}
    )
    results = ranks.run(tp, rewritten_steps, settings, 3)
    forward, backward = results[0]["exchanges"][:2]
    assert forward == Counter(
        all_gather_matmul=2, matmul_reduce_scatter=2, all_gather_into_tensor=left
    )
    assert backward == Counter(
        all_gather_matmul=2, matmul_reduce_scatter=2, reduce_scatter_tensor=left
    )
    compare(results, Reference(settings).run(global_batches(settings, 3)))


# --------------------------------------------------------------------------------------------------


def collectives(settings: dict[str, Any]) -> dict[str, int]:
    """How many of each kind one optimizer step calls: tensor parallelism's as tp.*, FSDP's and the
    step's own as dp.*
    """
    made = trainer(settings)
    made.step()  # FSDP sets itself up in the first one
    counts, watch = count_operations()
    with watch:
        made.step()
    names = {"_c10d_functional": "tp", "c10d": "dp"}
    kinds = {
        "all_gather_into_tensor": "all_gather",
        "reduce_scatter_tensor": "reduce_scatter",
        "_allgather_base_": "all_gather",
        "_reduce_scatter_base_": "reduce_scatter",
        "allreduce_": "all_reduce",
    }
    out = {}
    for name, number in counts.items():
        space, kind = name.split(".")[:2]
        if space in names and kind != "wait_tensor":
            out[f"{names[space]}.{kinds.get(kind, kind)}"] = number
    return out


def traffic(settings: dict[str, Any]) -> dict[str, int]:
    """Bytes of one optimizer step's collectives, by kind as above; operations through DTensor,
    before the update and in it.
    """
    made = trainer(settings)
    made.step()
    totals: Counter[str] = Counter()

    class Seen(Watch):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            totals["dtensor"] += any(issubclass(each, DTensor) for each in types)
            return super().__torch_dispatch__(func, types, args, kwargs)

    def seen(name: str, outputs: list[torch.Tensor]) -> None:
        space, kind = name.split(".")[:2]
        if space in ("_c10d_functional", "c10d") and kind != "wait_tensor":
            totals[f"{'tp' if space.startswith('_') else 'dp'}.{kind.strip('_')}"] += sum(
                each.nbytes for each in outputs
            )

    update: list[int] = []
    with Seen(seen):
        made.step(before_clipping=lambda: update.append(totals["dtensor"]))
    return {**totals, "dtensor": update[0], "dtensor_update": totals["dtensor"] - update[0]}


@pytest.mark.parametrize(("tp", "dp"), [(2, 2), (2, 1)])
def test_bytes_of_collectives(ranks: RankPool, tp: int, dp: int) -> None:
    layers, tokens = 2, 4 * 64
    settings = settings_of(
        FAMILIES["llama"], tp, dp, train={"micro_batch_size": 4, "global_batch_size": 4 * dp}
    )
    architecture = FAMILIES["llama"]
    model = trainer_size(architecture)
    for got in ranks.run(tp * dp, traffic, settings):
        # the whole residual stream of a micro-batch
        stream = tokens * architecture["hidden_size"] * 4
        assert got.pop("tp.all_gather_into_tensor") == 2 * (2 * layers + 1) * stream
        assert got.pop("tp.reduce_scatter_tensor") == 2 * (2 * layers + 1) * stream // tp
        # of the loss: the maximum; the sum and the logit at the label
        assert got.pop("tp.all_reduce") == 3 * 4 * tokens
        # forward and backward pass work with local tensors; FSDP's parameters that are split over
        # tp are DTensors, left once
        assert got.pop("dtensor_update") == 0, "norm, clipping and AdamW work on local tensors"
        assert got.pop("dtensor") == (7 * layers + 2 if dp > 1 else 0)
        if dp > 1:
            # embedding and head are gathered for the forward pass alone
            once, twice = model["tables"], model["layers"]
            assert got.pop("dp.allgather_base") == pytest.approx(
                4 * (once + 2 * twice) / tp, rel=0.02
            )
            assert got.pop("dp.reduce_scatter_base") == pytest.approx(
                4 * (once + twice) / tp / dp, rel=0.02
            )
        assert got.pop("dp.allreduce") < 4 * 2 * 64 * 10  # norms' gradients, and numbers
        assert not got


def trainer_size(architecture: dict[str, Any]) -> dict[str, int]:
    """Parameters of plain transformers' model: in the layers, and outside them."""
    sizes = {name: p.numel() for name, p in plain_model(architecture).named_parameters()}
    layers = sum(size for name, size in sizes.items() if ".layers." in name)
    return {"layers": layers, "tables": sum(sizes.values()) - layers}


@pytest.mark.parametrize("layers", [2, 4])
def test_number_of_collectives(ranks: RankPool, layers: int) -> None:
    architecture = {**FAMILIES["qwen2"], "num_hidden_layers": layers}
    settings = settings_of(architecture, 2, 2, train={"micro_batch_size": 4})
    assert (
        ranks.run(4, collectives, settings)
        == [
            {
                # into each attention and MLP and the head; in backward: row layers, embedding
                "tp.all_gather": 2 * (2 * layers + 1),
                "tp.reduce_scatter": 2 * (2 * layers + 1),  # their mirror image
                "tp.all_reduce": 2,  # the loss: the maximum, the sum
                # each layer, forward and backward; embedding and final norm with head: forward only
                "dp.all_gather": 2 * layers + 2,
                "dp.reduce_scatter": layers + 2,
                # labels, loss, gradients of replicated parameters in one, norm over dp, over tp
                "dp.all_reduce": 5,
            }
        ]
        * 4
    )


@pytest.mark.parametrize(("reshard", "gathers"), [(True, 2 * 2 + 2), (False, 2 + 2)])
def test_number_of_collectives_without_tensor_parallelism(
    ranks: RankPool, reshard: bool, gathers: int
) -> None:
    parallelism = {"tp": 1, "dp": 2, "reshard_after_forward": reshard}
    settings = settings_of(
        FAMILIES["qwen2"], parallelism=parallelism, train={"micro_batch_size": 4}
    )
    assert (
        ranks.run(2, collectives, settings)
        == [{"dp.all_gather": gathers, "dp.reduce_scatter": 2 + 2, "dp.all_reduce": 3}] * 2
    )


# -------------------------------------------------------------------------------------------------


def waits(settings: dict[str, Any]) -> int:
    """How often a micro-batch's forward and backward pass asks for a number, which on a GPU waits
    for it.
    """
    made = trainer(settings)
    made.step()
    (batch, *_), _ = made.data.step(made.cursor)
    counts, watch = count_operations()
    with watch:
        made.model.forward_backward([batch], torch.tensor(64.0))
    assert counts["aten.mm.default"], "the pass was not seen"
    return counts["aten._local_scalar_dense.default"]


@pytest.mark.parametrize("family", ["llama", "dynamic", "longrope", "gemma3_text"])
def test_a_pass_waits_for_nothing(ranks: RankPool, family: str) -> None:
    settings = settings_of(FAMILIES[family], train={"micro_batch_size": 8})
    assert ranks.run(1, waits, settings) == [0]
