"""What a layout's switches come to on a device, and what is refused there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tp_trainer.config import ConfigError, Parallelism
from tp_trainer.parallel import shard, shared

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def mesh(tp: int, dp: int, device: torch.device = GPU) -> Any:
    group = SimpleNamespace(get_group=lambda: None)
    return SimpleNamespace(tp_size=tp, dp_size=dp, device=device, tp=group, full={"dp": group})


@pytest.fixture
def reached() -> Any:
    with mock.patch.object(shard, "possible", side_effect=lambda group, device: device.type == "cuda") as patched:
        yield patched


@pytest.mark.parametrize(
    ("choice", "tp", "dp", "expected"),
    [({}, 2, 1, True), ({}, 2, 2, False), ({}, 4, 1, False), ({"async_tp": True}, 4, 2, True), ({"async_tp": False}, 2, 1, False),
     ({"float8": True}, 2, 1, True), ({"sequence_parallel": False}, 2, 1, False), ({"compile": False}, 2, 1, False)],
    ids=str,
)  # fmt: skip
def test_where_products_go_on_beside_the_exchange(choice: dict[str, Any], tp: int, dp: int, expected: bool, reached: Any) -> None:
    assert shard.is_async_tp(Parallelism(tp=tp, dp=dp, **choice), mesh(tp, dp)) is expected


@pytest.mark.parametrize(
    ("choice", "tp", "dp", "expected"),
    [({}, 1, 2, True), ({}, 1, 4, False), ({}, 2, 2, False), ({"dp_replicate": 2}, 1, 2, False), ({"direct_fsdp": True}, 2, 2, True),
     ({"direct_fsdp": True}, 2, 1, False), ({"direct_fsdp": False}, 1, 2, False)],
    ids=str,
)  # fmt: skip
def test_where_fsdp_exchanges_directly(choice: dict[str, Any], tp: int, dp: int, expected: bool, reached: Any) -> None:
    assert shard.is_direct(Parallelism(tp=tp, dp=dp, **choice), mesh(tp, dp)) is expected
    assert not shard.is_direct(Parallelism(tp=tp, dp=dp, **choice), mesh(tp, dp, CPU))


def test_where_memory_may_not_be_shared(caplog: pytest.LogCaptureFixture) -> None:
    with mock.patch.object(shared, "Shared", side_effect=RuntimeError("pidfd_getfd: Operation not permitted\nand so on")):
        assert not shared._works(SimpleNamespace(group_name="dp"), CPU)  # type: ignore[arg-type]
    assert caplog.messages == ["ranks can't share GPU memory (pidfd_getfd: Operation not permitted): exchange by NCCL alone"]


@pytest.mark.parametrize("key", ["async_tp", "direct_fsdp"])
def test_gpus_that_do_not_reach_one_another(key: str, reached: Any) -> None:
    reached.side_effect = lambda group, device: False
    asked = {"async_tp": shard.is_async_tp, "direct_fsdp": shard.is_direct}[key]
    with pytest.raises(ConfigError, match=f"parallelism.{key}=true: the GPUs of a .. group don't reach"):
        asked(Parallelism(async_tp=key == "async_tp", direct_fsdp=key == "direct_fsdp"), mesh(2, 2))
    assert not asked(Parallelism(tp=2, dp=1), mesh(2, 1)) and not asked(Parallelism(tp=1, dp=2), mesh(1, 2))


def test_gpus_without_float8() -> None:
    assert shard.is_float8(Parallelism(float8=True), CPU) and not shard.is_float8(Parallelism(), GPU)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: (8, 0)),
        mock.patch.object(torch.cuda, "get_device_name", lambda device: "A100"),
        pytest.raises(ConfigError, match=r"parallelism\.float8=true: A100 can't"),
    ):
        shard.is_float8(Parallelism(float8=True), GPU)
