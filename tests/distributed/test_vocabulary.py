"""No rank ever holds a tensor of sequence x whole vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_reference import FAMILIES, plain_model, settings_of
from rank_cases import Watch, trainer
from rank_pool import RankPool

from tp_trainer.loop import evaluate

VOCAB = 2048
SMALL = {
    **FAMILIES["qwen2"],
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
}


Largest = list[tuple[int, str, tuple[int, ...]]]  # one entry: elements, operation, shape


def largest_tensor() -> tuple[Largest, Watch]:
    """The largest tensor that an operation gives."""
    largest: Largest = [(0, "", ())]

    def seen(name: str, outputs: list[torch.Tensor]) -> None:
        largest[0] = max(
            largest[0],
            *((out.numel(), name, tuple(out.shape)) for out in outputs if not out.is_meta),
            (0, "", ()),
        )

    return largest, Watch(seen)


def training_and_evaluation(settings: dict[str, Any]) -> tuple[Largest, Largest]:
    made = trainer(settings)
    stepping, watch_step = largest_tensor()
    with watch_step:
        made.step()
    evaluating, watch_evaluation = largest_tensor()
    with watch_evaluation:
        evaluate(made.model, made.data.evaluation(), made.mesh)
    return stepping, evaluating


@pytest.mark.parametrize("layout", [(2, 2), (4, 1)])
def test_split_over_tp(ranks: RankPool, layout: tuple[int, int]) -> None:
    tp, dp = layout
    seq = 128
    settings = settings_of(
        SMALL,
        tp,
        dp,
        data={"seq_length": seq},
        train={"micro_batch_size": 1, "global_batch_size": 2, "eval_batches": 2},
    )
    for stepping, evaluating in ranks.run(4, training_and_evaluation, settings):
        for [(elements, operation, shape)] in (stepping, evaluating):
            assert elements < seq * VOCAB, (operation, shape)
            # this rank's logits are the largest: the watch saw them
            assert elements == seq * VOCAB // tp, (operation, shape)


@pytest.mark.slow
def test_in_chunks_without_tp(ranks: RankPool) -> None:
    seq = 12288  # three chunks of loss.CHUNK_TOKENS
    architecture = {
        **SMALL,
        "max_position_embeddings": seq,
        "vocab_size": 256,
        "intermediate_size": 32,
    }
    settings = settings_of(
        architecture,
        1,
        1,
        data={"seq_length": seq},
        train={"micro_batch_size": 1, "global_batch_size": 1, "eval_batches": 1},
    )
    [(stepping, evaluating)] = ranks.run(1, training_and_evaluation, settings)
    for [(elements, operation, shape)] in (stepping, evaluating):
        assert elements < seq * 256, (operation, shape)


def test_the_watch_sees_plain_logits() -> None:
    model, ids = plain_model(SMALL), torch.zeros(1, 128, dtype=torch.int64)
    largest, watch = largest_tensor()
    with watch:
        model(input_ids=ids, labels=ids).loss.backward()
    assert largest[0][0] >= 128 * VOCAB


def test_the_watch_sees_a_backward_pass() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return torch.ones(1000, 1000).sum() * torch.ones(3)

    x = torch.ones(3, requires_grad=True)
    largest, watch = largest_tensor()
    with watch:
        Double.apply(x).backward()
    assert largest[0][0] == 1_000_000
