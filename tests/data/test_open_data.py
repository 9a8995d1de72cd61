"""The data of a run as its ranks see it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tp_trainer.batch import IGNORE_INDEX, Batch
from tp_trainer.config import Config, ConfigError, load
from tp_trainer.data import Cursor, DataStream, TokenFiles, open_data

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 65536,
}


def config(tmp_path, **groups: dict[str, Any]) -> Config:
    data = {"seq_length": 128, "cache_dir": str(tmp_path), **groups.pop("data", {})}
    train = {"micro_batch_size": 2, "global_batch_size": 16, **groups.pop("train", {})}
    return load({"model": {"architecture": ARCHITECTURE}, "data": data, "train": train, **groups})


def stream(config: Config, dp_rank: int = 0, dp_size: int = 1) -> DataStream:
    return open_data(
        config,
        tokenizer="embedded",
        dp_rank=dp_rank,
        dp_size=dp_size,
        first_on_node=lambda make: make(),
    )


def rows_of(micro_batches: list[Batch]) -> set[tuple[int, ...]]:
    return {
        tuple(row)
        for batch in micro_batches
        for row in torch.cat([batch.input_ids, batch.labels], 1).tolist()
    }


@pytest.mark.parametrize("source", ["embedded", "random"])
def test_every_layout_sees_the_same_steps(tmp_path, source: str) -> None:
    run = config(tmp_path, data={"source": source})
    steps: dict[int, list[set[tuple[int, ...]]]] = {}
    for dp_size in (1, 2, 4):
        ranks = [stream(run, rank, dp_size) for rank in range(dp_size)]
        cursor, steps[dp_size] = Cursor(0, 32), []
        for _ in range(3):
            taken = [rank.step(cursor) for rank in ranks]
            assert len({str(after) for _, after in taken}) == 1
            assert all(
                len(part) == 8 // dp_size and part[0].input_ids.shape == (2, 128)
                for part, _ in taken
            )
            steps[dp_size].append(set().union(*(rows_of(part) for part, _ in taken)))
            cursor = taken[0][1]
    assert steps[1] == steps[2] == steps[4]
    assert all(len(step) == 16 for step in steps[1])


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_evaluation_counts_each_validation_label_once(tmp_path, dp_size: int) -> None:
    ranks = [stream(config(tmp_path), rank, dp_size) for rank in range(dp_size)]
    parts = [list(rank.evaluation()) for rank in ranks]
    assert len({len(part) for part in parts}) == 1
    labels = sum(int((batch.labels != IGNORE_INDEX).sum()) for part in parts for batch in part)
    assert labels == len(ranks[0].validation) * 128


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 8), (2, 4), (4, 1), (3, 4)])
def test_limited_evaluation_takes_the_same_rows_in_every_layout(
    tmp_path, dp_size: int, micro: int
) -> None:
    limited = config(
        tmp_path,
        train={
            "eval_batches": 2,
            "global_batch_size": 24 if dp_size == 3 else 16,
            "micro_batch_size": micro,
        },
    )
    rows = 2 * (24 if dp_size == 3 else 16)
    parts = [
        batch.input_ids
        for rank in range(dp_size)
        for batch in stream(limited, rank, dp_size).evaluation()
    ]
    # filled-up rows are zeros
    seen = [tuple(row.tolist()) for part in parts for row in part if row.any()]
    assert sorted(seen) == sorted(
        tuple(row.tolist()) for row in stream(limited).validation.batch(range(rows)).input_ids
    )


def test_length_of_a_run(tmp_path) -> None:
    run = config(tmp_path, train={"num_epochs": 3})
    per_epoch = len(stream(run).train) // 16
    assert stream(run).total_steps(run.train) == 3 * per_epoch
    run.train.max_steps = 7
    assert stream(run).total_steps(run.train) == 7
    capped = config(tmp_path, train={"max_steps_per_epoch": 5, "num_epochs": 2})
    assert stream(capped).total_steps(capped.train) == 10


def test_both_parts_are_made_where_first_on_node_says(tmp_path) -> None:
    calls = []

    def first_on_node(make: Callable[[], TokenFiles]) -> TokenFiles:
        assert not list(tmp_path.iterdir())
        calls.append(make())
        assert len(list(tmp_path.iterdir())) == 2
        return calls[0]

    opened = open_data(
        config(tmp_path), tokenizer="embedded", dp_rank=0, dp_size=1, first_on_node=first_on_node
    )
    assert len(calls) == 1 and len(opened.train) > 1000
    assert opened.unigram_loss == pytest.approx(6.73, abs=0.05)


def test_random_tokens_need_no_files_and_have_no_baseline(tmp_path) -> None:
    run = config(tmp_path, data={"source": "random"})
    opened = open_data(
        run,
        tokenizer="none",
        dp_rank=0,
        dp_size=1,
        first_on_node=lambda make: pytest.fail("nothing to make"),
    )
    assert opened.unigram_loss is None and len(opened.validation) == 64
    assert not rows_of([opened.train.batch(range(64))]) & rows_of(
        [opened.validation.batch(range(64))]
    )
    assert opened.train.batch([3]).input_ids.max() < 4096


def test_rows_longer_than_a_part(tmp_path) -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"^data\.seq_length=60000: the validation part has only [\d,]+ tokens, less than one"
            r" row; give at most"
        ),
    ):
        stream(config(tmp_path, data={"seq_length": 60000}))


def test_global_batch_larger_than_the_data(tmp_path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^train\.global_batch_size=64: the training data has only \d+ rows; give at most",
    ):
        stream(config(tmp_path, data={"percentage": 0.5}, train={"global_batch_size": 64}))


def test_identity_is_that_of_the_tokens(tmp_path) -> None:
    def of(name: str, text: str) -> str:
        path = tmp_path / name / "book.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return stream(
            config(
                tmp_path, data={"source": "text", "name": str(path), "validation_percentage": 50.0}
            )
        ).train.identity

    words = [f"the whale number {number} came up\n" for number in range(2000)]
    assert of("one", "".join(words)) == of("two", "".join(words)), "wherever it lies"
    swapped = [*words[:300], words[301], words[300], *words[302:]]
    # the same words in another order, and one line less
    assert (
        len(
            {
                of("one", "".join(words)),
                of("three", "".join(swapped)),
                of("four", "".join(words[1:])),
            }
        )
        == 3
    )
    assert stream(config(tmp_path, data={"source": "random"})).train.identity == "random"
