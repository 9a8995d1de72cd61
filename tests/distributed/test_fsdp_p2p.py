"""FSDP2's exchange without copies: the same numbers as FSDP2's own, two blocks' memory, half the
bytes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from plain_reference import FAMILIES, settings_of
from rank_cases import Trainer, trainer
from rank_pool import RankPool

from tp_trainer.loop import evaluate
from tp_trainer.parallel.fast import choice, fsdp_p2p, symmetric_memory
from tp_trainer.parallel.fast.symmetric_memory import SharedBuffer

DEEP = {"num_hidden_layers": 5}  # each of the two sets of buffers has several blocks to hold
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1_dp2": {"tp": 1, "dp": 2},
    "tp2_dp2": {"tp": 2, "dp": 2},
    "rep2": {"tp": 1, "dp": 4, "dp_replicate": 2},
}


class Mapped(SharedBuffer):
    """Memory that processes reach by a file, where there is none of GPUs."""

    def __init__(self, numel: int, like: torch.Tensor, group: str) -> None:
        # a name
        self.group, self.dtype = dist.distributed_c10d._resolve_process_group(group), like.dtype  # type: ignore[arg-type]
        self.rank, self.size = self.group.rank(), self.group.size()
        with tempfile.NamedTemporaryFile() as own:
            own.truncate(numel * like.dtype.itemsize)
            files = [own.name] * self.size
            dist.all_gather_object(files, own.name, group=self.group)
            self.maps = [np.memmap(file, np.uint8, "r+") for file in files]
            self.barrier()
        self.buffer, self.handle = self.of(self.rank, (numel,), 0), None  # type: ignore[assignment]
        symmetric_memory._open.add(self)

    def barrier(self) -> None:
        dist.barrier(self.group)

    def of(self, rank: int, shape: Sequence[int], offset: int) -> torch.Tensor:
        numel, size = torch.Size(shape).numel(), self.dtype.itemsize
        return (
            torch.from_numpy(self.maps[rank][offset * size :][: numel * size])
            .view(self.dtype)
            .view(*shape)
        )


def made_of(settings: dict[str, Any]) -> Trainer:
    with mock.patch.object(choice, "possible", return_value=True):
        return trainer(settings)


@mock.patch.object(fsdp_p2p, "SharedBuffer", Mapped)
def steps(family: str, parallelism: dict[str, Any]) -> list[float]:
    settings = settings_of(
        {**FAMILIES[family], **DEEP},
        parallelism=parallelism,
        optim={"lr": 1e-2},
        train={
            "eval_batches": 1,
            "micro_batch_size": 1,
            "global_batch_size": 2 * parallelism["dp"],
        },
    )
    made, out = made_of(settings), list[float]()
    for number in range(4):
        out += made.step()
        if number == 2:
            out.append(evaluate(made.model, made.data.evaluation(), made.mesh))
    return out


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen2", "tp2_dp2"), ("odd_vocabulary", "tp1_dp2"), ("qwen2_tied", "rep2")],
)
def test_the_numbers_are_those_of_fsdp2(
    ranks: RankPool, family: str, layout: str, dtype: str
) -> None:
    """To the last bit: two numbers, or two replicas' two, add up to the same in any order."""
    parallelism = {**LAYOUTS[layout], "param_dtype": dtype}
    world = parallelism["tp"] * parallelism["dp"]
    own, ours = (
        ranks.run(world, steps, family, {**parallelism, "direct_fsdp": way})
        for way in (False, True)
    )
    assert own[0][1] != own[0][-1], "the steps change something"
    assert ours == own


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [{"activation_checkpointing": "full"}, {"reshard_after_forward": False}], ids=str
)
def test_also_where_blocks_are_gathered_otherwise(ranks: RankPool, way: dict[str, Any]) -> None:
    own, ours = (
        ranks.run(2, steps, "qwen2", {**LAYOUTS["tp1_dp2"], **way, "direct_fsdp": direct})
        for direct in (False, True)
    )
    assert ours == own


@mock.patch.object(fsdp_p2p, "SharedBuffer", Mapped)
def counted(direct_fsdp: bool) -> dict[str, int]:
    """A step in bfloat16: numbers copied out of gathered buffers, bytes of gradients received;
    memory that blocks are gathered to.
    """
    parallelism = {**LAYOUTS["tp1_dp2"], "param_dtype": "bfloat16", "direct_fsdp": direct_fsdp}
    settings = settings_of(
        {**FAMILIES["qwen2"], **DEEP}, parallelism=parallelism, train={"global_batch_size": 4}
    )
    made = made_of(settings)
    made.step()
    layers = made.model.module.model.layers
    wholes = {
        each.all_gather_outputs[0].data_ptr(): each.all_gather_outputs[0].numel()
        for layer in layers
        for each in layer._get_fsdp_state()._fsdp_param_group.fsdp_params
    }
    with (
        mock.patch.object(
            torch, "split_with_sizes_copy", side_effect=torch.split_with_sizes_copy
        ) as copied,
        mock.patch.object(fsdp_p2p, "add_up", side_effect=fsdp_p2p.add_up) as added,
    ):
        made.step()
    return {
        "copied": sum(call.args[0].numel() for call in copied.call_args_list),
        "received": sum(call.args[2].nbytes for call in added.call_args_list),
        "held": sum(wholes.values()),
        "all": sum(each.numel() for each in made.model.module.parameters()),
        "blocks": sum(each.numel() for each in layers.parameters()),
        "layers": len(layers),
    }


def test_blocks_are_gathered_in_place_and_gradients_sent_as_they_are(ranks: RankPool) -> None:
    own, ours = (ranks.run(2, counted, way)[0] for way in (False, True))
    assert own["copied"] - ours["copied"] == 2 * ours["blocks"], (
        "once for the forward pass, once for the backward pass"
    )
    assert (own["received"], ours["received"]) == (
        0,
        ours["all"],
    ), "half of them from the other rank, two bytes each"
    assert ours["held"] == 2 * ours["blocks"] // ours["layers"], "two blocks at a time"


def values(rank: int, call: int, *shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape) + 1000.0 * rank + 100.0 * call


@mock.patch.object(fsdp_p2p, "SharedBuffer", Mapped)
def exchanged() -> None:
    """Two calls of each, the last rank always late to use what it has got."""
    group = dist.distributed_c10d._get_default_group()
    rank, ranks = group.rank(), group.size()
    channel, slot = fsdp_p2p.Channel(), fsdp_p2p.Slot()
    for call in range(2):
        shards = [values(rank, call, 3), values(rank, call, 70)]
        memory, places, wholes = slot.place(shards, group)
        channel.gather(shards, memory, places)
        time.sleep(0.5 * (rank == ranks - 1))
        for whole, count in zip(wholes, (3, 70), strict=True):
            assert torch.equal(
                whole, torch.cat([values(each, call, count) for each in range(ranks)])
            ), call
    for call in range(2):
        pieces = [values(rank, call, ranks, 3), values(rank, call, ranks, 70)]
        received = channel.swap(pieces, group.group_name)
        time.sleep(0.5 * (rank == ranks - 1))
        for piece, others, count in zip(pieces, received, (3, 70), strict=True):
            from_each = [values(each, call, ranks, count)[rank] for each in range(ranks)]
            assert torch.equal(others, torch.stack(from_each[:rank] + from_each[rank + 1 :])), call
            total = torch.empty(count)
            fsdp_p2p.add_up(total, piece[rank], others, rank, 1 / ranks)
            torch.testing.assert_close(total, torch.stack(from_each).mean(0))


def test_four_ranks_put_everything_where_it_belongs(ranks: RankPool) -> None:
    ranks.run(4, exchanged)


@mock.patch.object(fsdp_p2p, "SharedBuffer", Mapped)
def left_over() -> list[bool]:
    """For each shared memory of a model that was closed, whether it is still there."""
    parallelism = {**LAYOUTS["tp1_dp2"], "direct_fsdp": True}
    made = made_of(
        settings_of(FAMILIES["qwen2"], parallelism=parallelism, train={"global_batch_size": 4})
    )
    made.step()
    memories = list(symmetric_memory._open)
    made.model.close()
    return [hasattr(memory, "buffer") or hasattr(memory, "handle") for memory in memories]


def test_a_closed_model_shares_nothing(ranks: RankPool) -> None:
    for memories in ranks.run(2, left_over):
        assert memories and not any(memories)
