"""Copies in the dtype of compute where dp is 1: made block by block they give the numbers of those
that stay, and only one block's are there at a time.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from plain_reference import FAMILIES, settings_of
from rank_cases import NEEDS_COMPILER, trainer, whole_parameters
from rank_pool import RankPool

from tp_trainer.loop import evaluate
from tp_trainer.parallel.fast.compute_copies import ComputeCopies, _Block

DEEP = {"num_hidden_layers": 4}


def numbers(
    family: str, parallelism: dict[str, Any], train: dict[str, Any], broken: bool = False
) -> tuple[list[float], dict[str, torch.Tensor] | None]:
    """Losses and norms of three steps and an evaluation, and what the parameters are then."""
    settings = settings_of(
        {**FAMILIES[family], **DEEP},
        parallelism={"dp": 1, "param_dtype": "bfloat16", **parallelism},
        optim={"lr": 1e-2},
        train={"eval_batches": 1, **train},
    )
    with pytest.MonkeyPatch.context() as patch:
        if broken:  # the backward pass finds what the forward pass has left

            def begin(self: _Block, gradient: torch.Tensor | None = None) -> None:
                owner = self.owner()
                if gradient is None and owner is not None:
                    owner.give_way(self)

            patch.setattr(_Block, "_begin", begin)
            patch.setattr(_Block, "free", forget)
        made, out = trainer(settings), list[float]()
        for number in range(3):
            out += made.step()
            if number == 1:
                out.append(evaluate(made.model, made.data.evaluation(), made.mesh))
    return out, whole_parameters(made.model)


def forget(self: _Block) -> None:
    for copy, _ in self.pairs:
        copy.untyped_storage().fill_(0)  # type: ignore[attr-defined]  # unseen by autograd, as the memory's next owner


@pytest.mark.sampled(7)
@pytest.mark.parametrize(
    ("family", "parallelism", "train"),
    [
        ("qwen2", {"tp": 2}, {}),
        ("qwen2_tied", {"tp": 2, "activation_checkpointing": "full"}, {}),
        ("gemma2", {"tp": 1, "activation_checkpointing": "selective"}, {}),
        ("phi3", {"tp": 1}, {"micro_batch_size": 8}),
        pytest.param("llama", {"tp": 2, "compile": True}, {}, marks=NEEDS_COMPILER),
    ],
    ids=str,
)
def test_block_by_block_gives_the_same_numbers(
    ranks: RankPool, family: str, parallelism: dict[str, Any], train: dict[str, Any]
) -> None:
    (stay, kept), (leave, made) = (
        ranks.run(
            parallelism["tp"],
            numbers,
            family,
            {**parallelism, "compute_copies": way},
            train,
        )[0]
        for way in (True, False)
    )
    assert stay[1] != stay[-1] and leave == stay
    assert all(torch.equal(made[name], kept[name]) for name in kept)


def test_without_making_them_anew_in_the_backward_pass_they_differ(ranks: RankPool) -> None:
    layout = {"tp": 1, "compute_copies": False}
    sound, broken = (ranks.run(1, numbers, "qwen2", layout, {}, way)[0][0] for way in (False, True))
    assert broken[0] == sound[0] and broken[1] != sound[1], "the loss, not the gradient"


def held() -> tuple[int, int, list[int]]:
    """Bytes of all copies, of the largest block's, and of those that are there as each begins."""
    settings = settings_of(
        {**FAMILIES["qwen2"], **DEEP},
        parallelism={"tp": 1, "dp": 1, "param_dtype": "bfloat16", "compute_copies": False},
    )
    made, seen = trainer(settings), list[int]()
    copies = made.model.copies
    assert copies is not None
    every = [copy for *_, copy in copies.slots]
    give_way = ComputeCopies.give_way

    def watched(self: ComputeCopies, block: _Block | None) -> None:
        give_way(self, block)
        seen.append(sum(copy.untyped_storage().nbytes() for copy in every))

    with mock.patch.object(ComputeCopies, "give_way", watched):
        made.step()
    whole = sum(copy.numel() * 2 for copy in every)
    return whole, max(sum(block.sizes) for block in copies.blocks), seen


def test_one_block_at_a_time(ranks: RankPool) -> None:
    whole, largest, seen = ranks.run(1, held)[0]
    norms = 2 * FAMILIES["qwen2"]["hidden_size"]
    assert seen[-1] == norms, "the last norm's are all that stays"
    assert max(seen) == largest + norms < whole / 3
    # 4 micro-batches, 4 blocks and 2 tables, forward and backward, head and loss in one
    assert sum(count > norms for count in seen) >= 4 * 2 * 6
