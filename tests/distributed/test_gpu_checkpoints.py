"""Checkpoints of a GPU's state: each way of copying it is exact, and the next step finds its
memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tp_trainer.checkpoint import snapshot
from tp_trainer.checkpoint.files import PIECE_BYTES
from tp_trainer.checkpoint.saving import Checkpoints
from tp_trainer.checkpoint.state import RunState
from tp_trainer.checkpoint.store import VerifiedCheckpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = dist.FileStore(str(tmp_path_factory.mktemp("world") / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def made(
    run_dir: Path, asynchronous: bool = True
) -> tuple[nn.Module, torch.optim.Optimizer, Checkpoints]:
    torch.manual_seed(0)
    # one tensor of more than two pieces, an odd one, one in half precision
    sizes = [(PIECE_BYTES // 4 * 2 + 77, torch.float32), (3, torch.float32), (1001, torch.bfloat16)]
    model = nn.ParameterList(
        nn.Parameter(torch.randn(size, device=DEVICE).to(dtype)) for size, dtype in sizes
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return (
        model,
        optimizer,
        Checkpoints(str(run_dir), 9, model, optimizer, DEVICE, asynchronous=asynchronous),
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("where", ["device", "host", "none"])
def test_what_is_written_is_the_state_at_the_save(tmp_path: Path, where: str) -> None:
    model, optimizer, saves = made(tmp_path, where != "none")
    room = (
        nullcontext()
        if where == "device"
        else mock.patch.object(torch.cuda, "mem_get_info", lambda device: (0, 1 << 40))
    )
    taken: list[str] = []
    take = snapshot.Snapshots.take

    def seen(self: Any, tensors: Any) -> Any:
        copy = take(self, tensors)
        taken.append(copy.where)
        return copy

    with mock.patch.object(snapshot.Snapshots, "take", seen), room:
        for number in (1, 2):  # the second takes what the first has left
            step(model, optimizer)
            expected = {
                name: tensor.clone() for name, tensor in saves.tensors(with_rng=True).items()
            }
            before = torch.cuda.memory_allocated()
            counts = RunState(number, epoch=0, offset=0, tokens=0, global_batch_size=1)
            saves.save(counts, last=False)
            for _ in range(5):
                step(model, optimizer)
            saves.wait()
            (saved,) = saves.done()
            assert saved.error is None
            assert torch.cuda.memory_allocated() <= before, "no copy is left on the device"
    assert taken == [where, where]
    _, _, restorer = made(tmp_path)
    found = restorer.store.check("step_00000002")
    assert isinstance(found, VerifiedCheckpoint) and restorer.damage(found) is None
    restorer.restore(found)
    after = restorer.tensors(with_rng=True)
    assert (
        after.keys() == expected.keys()
        and [name for name in after if not torch.equal(after[name], expected[name])] == []
    )
