"""Dropout under tensor parallelism: one mask for what a TP group holds in common, another for each
rank's heads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_reference import FAMILIES, settings_of
from rank_cases import trainer
from rank_pool import RankPool

PHI3 = {**FAMILIES["phi3"], "resid_pdrop": 0.5, "attention_dropout": 0.5, "sliding_window": None}


def masks_of_a_step(settings: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
    """What each residual dropout and attention of a step left out, as bool tensors, in order."""
    made = trainer(settings)
    found: dict[str, list[torch.Tensor]] = {"residual": [], "attention": []}
    for name, module in made.model.module.named_modules():
        if name.endswith("_dropout"):
            module.register_forward_hook(
                lambda module, inputs, out: found["residual"].append(out.detach() == 0)
            )
    whole = torch.nn.functional.scaled_dot_product_attention

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        """The weights themselves come out where the values are the unit matrix; the same draws are
        then made again.
        """
        state, length = torch.get_rng_state(), query.shape[2]
        unit = torch.eye(length).expand(*key.shape[:2], length, length)
        weights = whole(query * 0, key * 0, unit, **options)
        torch.set_rng_state(state)
        found["attention"].append((weights == 0) & torch.ones(length, length).tril().bool())
        return whole(query, key, value, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        made.step()
    return found


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_residual_masks_agree_and_attention_masks_differ(ranks: RankPool, recomputed: str) -> None:
    parallelism = {"sequence_parallel": False, "activation_checkpointing": recomputed}
    one, two = ranks.run(2, masks_of_a_step, settings_of(PHI3, 2, 1, parallelism=parallelism))
    # micro-batches, layers, dropouts
    assert len(one["residual"]) == len(two["residual"]) >= 4 * 2 * 2
    for mine, other in zip(one["residual"], two["residual"], strict=True):
        assert torch.equal(mine, other)
        assert 0.45 < mine.float().mean() < 0.55
    for mine, other in zip(one["attention"], two["attention"], strict=True):
        assert 0.2 < (mine ^ other).float().mean() < 0.3  # half of the lower triangle's
    assert not torch.equal(one["residual"][0], one["residual"][1])


def test_with_sequence_parallelism_every_token_has_draws_of_its_own(ranks: RankPool) -> None:
    one, two = ranks.run(2, masks_of_a_step, settings_of(PHI3, 2, 1))
    for mine, other in zip(one["residual"], two["residual"], strict=True):
        assert 0.4 < (mine ^ other).float().mean() < 0.6
