"""The passes over a chunk's logits, those for torch.compile too, against torch's own cross-entropy
in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tp_trainer.batch import IGNORE_INDEX
from tp_trainer.parallel import loss
from tp_trainer.parallel.collectives import TensorRegion


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chunk", [4096, 7])
def test_loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, chunk: int, compiled: bool, softcap: float | None
) -> None:
    asked: list[Any] = []

    def not_compiled(function: Any) -> Any:  # the compiler itself has its own test
        asked.append(function)
        return function

    monkeypatch.setattr(loss, "_compiled", not_compiled)
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(20, 8), torch.randn(33, 8), torch.randint(33, (20,))
    labels[::6] = IGNORE_INDEX

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = hidden @ weight.t()
        capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(capped, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    def ours(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return loss.linear_cross_entropy(
            hidden, weight, labels, TensorRegion("none", 1, 0, False), 0, softcap, compiled
        )

    results: list[list[Any]] = []
    for function, dtype in ((plain, torch.float64), (ours, torch.float32)):
        given: list[Any] = [each.to(dtype, copy=True).requires_grad_() for each in (hidden, weight)]
        value = function(*given)
        (value * 0.5).backward()
        results.append([value.detach().double(), *(each.grad.double() for each in given)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert bool(asked) == compiled
