"""While a model is built, a rank holds its shard and one whole tensor at most; once nobody has it,
it holds nothing.
"""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_reference import FAMILIES, SIZES, plain_model, settings_of
from rank_cases import trainer
from rank_pool import RankPool
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from tp_trainer.config import load
from tp_trainer.models.build import build_model
from tp_trainer.models.description import meta_model
from tp_trainer.parallel.mesh import build_mesh

ARCHITECTURE = {
    "model_type": "llama",
    **SIZES,
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
}


def peak_bytes(work: Callable[[], Any], mapped: set[int]) -> int:
    """The most bytes that `work` held at once: by the records of torch's CPU allocator, and
    Python's own on top.

    Args:
        mapped: sizes of files. torch records a mapped file as if it were held; its pages are the
            kernel's, shared by all ranks.
    """
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        work()
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    events, pending = [], list(records.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag == _EventType.Allocation:
            events.append(
                (event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size)
            )
    held = peak = 0
    sizes: dict[int, int] = {}
    for _, address, size in sorted(events):
        if size > 0 and size not in mapped:
            sizes[address] = size
            held += size
        elif size <= 0:
            held -= sizes.pop(address, 0)
        peak = max(peak, held)
    return peak + python


def building(settings: dict[str, Any], work: str) -> tuple[int, int, int, int]:
    """(peak, this rank's shard, largest tensor, whole model) in bytes."""
    config = load(settings)
    mesh = build_mesh(config.parallelism, torch.device("cpu"))
    # what is imported on the way is no tensor
    build_model(load(settings_of(FAMILIES["llama"], 2, 2)), mesh, lambda find: find())
    kept: list[Any] = []

    def build() -> None:
        kept.append(build_model(config, mesh, lambda find: find()))

    def build_whole_first() -> None:
        whole = meta_model(config.model.architecture).to_empty(device="cpu")
        build()
        del whole

    def build_from_bytes() -> None:
        content = next(Path(settings["model"]["name"]).glob("*.safetensors")).read_bytes()
        build()
        del content

    mapped = {
        file.stat().st_size
        for file in Path(settings["model"].get("name", "/nowhere")).glob("*.safetensors")
    }
    peak = peak_bytes(
        {
            "build": build,
            "build_whole_first": build_whole_first,
            "build_from_bytes": build_from_bytes,
        }[work],
        mapped,
    )
    tensors = [*kept[0].parameters, *kept[0].module.buffers()]
    shard = sum(
        each.to_local().nbytes if hasattr(each, "to_local") else each.nbytes for each in tensors
    )
    sizes = [4 * each.numel() for each in tensors]
    return peak, shard, max(sizes), sum(sizes)


def settings_for(weights: str, directory: Path) -> dict[str, Any]:
    if weights == "random":
        return settings_of(ARCHITECTURE, 2, 2)
    plain_model(ARCHITECTURE).save_pretrained(directory)
    return settings_of(str(directory), 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["random", "pretrained"])
def test_peak_of_building(ranks: RankPool, tmp_path: Path, weights: str) -> None:
    for peak, shard, largest, whole in ranks.run(
        4, building, settings_for(weights, tmp_path), "build"
    ):
        print(peak, shard, largest, whole)
        assert shard < 0.26 * whole and 20e6 < whole < 50e6
        assert shard <= peak <= 1.3 * shard + largest < 0.6 * whole, (peak, shard, largest, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "work"), [("random", "build_whole_first"), ("pretrained", "build_from_bytes")]
)
def test_the_measure_sees_a_whole_model(
    ranks: RankPool, tmp_path: Path, weights: str, work: str
) -> None:
    for peak, shard, largest, whole in ranks.run(
        4, building, settings_for(weights, tmp_path), work
    ):
        assert peak > whole > 1.3 * shard + largest


def outlives(settings: dict[str, Any]) -> bool:
    """Whether a model is held by something after a step, when nobody has it any more."""
    made = trainer(settings)
    made.step()
    made.model.close()
    held = [weakref.ref(each) for each in (made.model.module, *made.model.parameters)]
    del made
    gc.collect()
    return any(each() is not None for each in held)


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 1), (1, 2)])
def test_a_model_that_nobody_has_is_let_go(ranks: RankPool, tp: int, dp: int) -> None:
    assert ranks.run(tp * dp, outlives, settings_of(FAMILIES["llama"], tp, dp)) == [False] * tp * dp
