"""Which fast paths a layout takes on a device, why, and what is refused there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tp_trainer.config import ConfigError, Parallelism, architecture, load
from tp_trainer.models.description import described
from tp_trainer.models.split import split_table
from tp_trainer.parallel.fast import HOLDING, FastPaths, Memory, choice, symmetric_memory
from tp_trainer.parallel.mesh import Axis, Mesh
from tp_trainer.view import path_line

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def mesh(tp: int, dp: int, device: torch.device = GPU, replicas: int = 1) -> Any:
    axes = Axis(dp), Axis(replicas), Axis(dp // replicas), Axis(tp)
    return Mesh(device, SimpleNamespace(), *axes)  # type: ignore[arg-type]


LITTLE = Memory(trained=1, frozen=0, activations=1, compute=2, gradient=2)
FLOAT32 = replace(LITTLE, compute=4, gradient=4)


def chosen(where: Any, lean: bool = False, memory: Memory = LITTLE, **keys: Any) -> FastPaths:
    layout = {"tp": where.tensor.size, "dp": where.data.size, "dp_replicate": where.replicate.size}
    return FastPaths.choose(Parallelism(**{**layout, **keys}), where, memory, lean)


@pytest.fixture(autouse=True)
def reached() -> Iterator[Any]:
    """GPUs that reach one another's memory, of 80 GB each."""
    eighty = SimpleNamespace(total_memory=int(79.1 * 2**30))
    with (
        mock.patch.object(
            choice, "possible", side_effect=lambda group, device: device.type == "cuda"
        ) as patched,
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: (9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: eighty),
    ):
        yield patched


@pytest.mark.parametrize(
    ("keys", "tp", "dp", "expected"),
    [
        ({}, 2, 1, True),
        ({}, 2, 2, False),
        ({}, 4, 1, False),
        ({"async_tp": True}, 4, 2, True),
        ({"async_tp": False}, 2, 1, False),
        ({"float8": True}, 2, 1, True),
        ({"sequence_parallel": False}, 2, 1, False),
        ({"compile": False}, 2, 1, False),
    ],
    ids=str,
)
def test_where_matmuls_run_beside_the_collectives(
    keys: dict[str, Any], tp: int, dp: int, expected: bool
) -> None:
    assert chosen(mesh(tp, dp), **keys).async_tp.on is expected


@pytest.mark.parametrize(
    ("keys", "tp", "dp", "replicas", "expected"),
    [
        ({}, 1, 2, 1, True),
        ({}, 1, 4, 1, False),
        ({}, 2, 2, 1, False),
        ({}, 1, 2, 2, False),
        ({}, 1, 4, 2, False),
        ({"direct_fsdp": True}, 2, 2, 1, True),
        ({"direct_fsdp": True}, 2, 1, 1, False),
        ({"direct_fsdp": False}, 1, 2, 1, False),
    ],
    ids=str,
)
def test_where_fsdp_exchanges_directly(
    keys: dict[str, Any], tp: int, dp: int, replicas: int, expected: bool
) -> None:
    assert chosen(mesh(tp, dp, replicas=replicas), **keys).direct_fsdp.on is expected
    assert not chosen(mesh(tp, dp, CPU, replicas), **keys).direct_fsdp.on


def test_on_a_cpu_nothing_is_on_but_what_was_asked_for() -> None:
    paths = chosen(mesh(2, 1, CPU), memory=FLOAT32)
    assert path_line(paths.entries()) == (
        "fast paths: none; off: compile, cuda_graphs, async_tp (no GPU); direct_fsdp (dp is 1);"
        " float8 (not asked for); compute_copies (computes in float32)"
    )
    asked = chosen(mesh(2, 2, CPU), compile=True, async_tp=True, float8=True)
    assert [name for name, path in asked.entries().items() if path.on] == [
        "compile",
        "async_tp",
        "float8",
    ]


def test_where_memory_may_not_be_shared(caplog: pytest.LogCaptureFixture) -> None:
    refused = RuntimeError("pidfd_getfd: Operation not permitted\nand so on")
    with mock.patch.object(symmetric_memory, "SharedBuffer", side_effect=refused):
        assert not symmetric_memory._works(SimpleNamespace(group_name="dp"), CPU)  # type: ignore[arg-type]
    assert caplog.messages == [
        "ranks can't share GPU memory (pidfd_getfd: Operation not permitted): exchange by NCCL"
        " alone"
    ]


@pytest.mark.parametrize("key", ["async_tp", "direct_fsdp"])
def test_gpus_that_do_not_reach_one_another(key: str, reached: Any) -> None:
    asked: dict[str, Any] = {key: True}
    reached.side_effect = lambda group, device: False
    with pytest.raises(
        ConfigError, match=f"parallelism.{key}=true: no peer access between the GPUs of a .. group"
    ):
        chosen(mesh(2, 2), **asked)
    for where in (mesh(2, 1), mesh(1, 2)):
        path = getattr(chosen(where), key)
        assert not path.on
    assert chosen(mesh(2, 1)).async_tp.why == chosen(mesh(1, 2)).direct_fsdp.why
    assert "no peer access" in chosen(mesh(2, 1)).async_tp.why


def test_gpus_without_float8() -> None:
    assert chosen(mesh(1, 1, CPU), float8=True).float8.on and not chosen(mesh(1, 1)).float8.on
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: (8, 0)),
        mock.patch.object(torch.cuda, "get_device_name", lambda device: "A100"),
        pytest.raises(ConfigError, match=r"parallelism\.float8=true: A100 can't"),
    ):
        chosen(mesh(1, 1), float8=True)


# --------------------------------------------------------------------------------- memory


def needed(layers: int, tp: int = 1, **keys: Any) -> Memory:
    """Of Llama-3-8B's widths, 2048 x 4 tokens in bfloat16."""
    config = load({"experiment_name": "x", "model": LLAMA_8B})
    config.model.architecture["num_hidden_layers"] = layers
    model = described(config.model, None)
    assert architecture(config).hidden_size == 4096
    options: dict[str, Any] = {
        "recomputed": False,
        "accumulated": False,
        "compute": torch.bfloat16,
        **keys,
    }
    return Memory.of(
        model, list(model.base_model.layers), split_table(model, tp), tp, 8192, **options
    )


LLAMA_8B = {
    "architecture": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    }
}


def test_memory_is_what_was_measured() -> None:
    """One H100, 12 layers, a micro-batch a step: 66.1 GiB at the peak (RESULTS.md)."""
    assert needed(12).bytes / 2**30 == pytest.approx(66.1, rel=0.03)
    assert needed(12).trained == pytest.approx(3.67e9, rel=0.01)
    assert needed(12, tp=2).trained == pytest.approx(3.67e9 / 2, rel=0.01)
    assert needed(12, accumulated=True).gradient == 4
    assert needed(12, recomputed=True).activations < needed(12).activations / 3


def test_copies_go_where_they_do_not_fit() -> None:
    one = mesh(1, 1)
    assert chosen(one, memory=needed(12)).compute_copies.on
    path = chosen(one, memory=needed(16)).compute_copies
    assert not path.on and "of 76.7 GiB with them" in path.why
    assert chosen(one, memory=needed(16), compute_copies=True).compute_copies.on
    assert not chosen(one, memory=needed(12), compute_copies=False).compute_copies.on
    assert not chosen(mesh(1, 2), memory=needed(12)).compute_copies.on
    with pytest.raises(ConfigError, match=r"compute_copies=true: needs a dtype of compute below"):
        chosen(one, memory=FLOAT32, compute_copies=True)


def test_a_leaner_start_leaves_out_what_holds_memory_unless_it_was_asked_for() -> None:
    where = mesh(2, 1)
    assert {key for key in HOLDING if chosen(where).may_go(key)} == {
        "cuda_graphs",
        "async_tp",
        "compute_copies",
    }
    lean = chosen(where, lean=True, cuda_graphs=True)
    assert lean.cuda_graphs.on and lean.compile.on
    assert not lean.async_tp.on and not lean.compute_copies.on
    assert "memory ran out" in lean.async_tp.why
    assert not any(map(chosen(where, lean=True).may_go, HOLDING)), "it can't be leaner"
