"""Tokenizer choice, token files, rows and the unigram baseline."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from tp_trainer.assets import TOKENIZER
from tp_trainer.batch import IGNORE_INDEX
from tp_trainer.config import ConfigError, Data, Model
from tp_trainer.data import tokens
from tp_trainer.data.rows import (
    RandomRows,
    Rows,
    unigram_loss,
    unigram_loss_of_counts,
)
from tp_trainer.data.sources import documents
from tp_trainer.data.tokenizer import choose_tokenizer, load_tokenizer
from tp_trainer.data.tokens import prepare

TEXTS = [f"document {i} of whales and ships, " * (i % 5 + 1) for i in range(30)]


@pytest.fixture
def data(tmp_path) -> Data:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return Data(
        source="jsonl",
        name=str(tmp_path / "a.jsonl"),
        validation_percentage=10,
        cache_dir=str(tmp_path / "cache"),
    )


def word_tokenizer(directory: Path, vocabulary: dict[str, int], **settings: str) -> str:
    """A tokenizer directory that splits at spaces."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    )
    return str(directory)


# --------------------------------------------------------------------------------------------------


def test_what_is_typed_wins(tmp_path) -> None:
    own = Model(name=str(TOKENIZER), weights="pretrained")
    assert choose_tokenizer(Data(tokenizer="owner/model"), own, 10) == ("owner/model", None)
    assert choose_tokenizer(Data(tokenizer="gpt2"), own, 10) == ("gpt2", None)
    assert choose_tokenizer(Data(tokenizer="embedded"), own, 4096) == ("embedded", None)
    directory = word_tokenizer(tmp_path / "words", {"?": 0})
    assert choose_tokenizer(Data(tokenizer=directory), own, 10) == (directory, None)


def test_the_models_own_comes_next(tmp_path) -> None:
    assert choose_tokenizer(Data(), Model(name=str(TOKENIZER), weights="random"), 4096) == (
        str(TOKENIZER),
        None,
    )
    assert choose_tokenizer(Data(), Model(name="owner/model", weights="pretrained"), 32000) == (
        "owner/model",
        None,
    )


def test_the_embedded_one_comes_last(tmp_path) -> None:
    assert choose_tokenizer(Data(), Model(weights="random"), 4096) == ("embedded", None)
    for name in ("owner/model", str(tmp_path)):
        chosen, sentence = choose_tokenizer(Data(), Model(name=name, weights="random"), 32000)
        assert (
            chosen == "embedded"
            and sentence is not None
            and name in sentence
            and "4,096" in sentence
        )
    assert choose_tokenizer(Data(source="random"), Model(weights="random"), 10) == ("none", None)


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "expected"),
    [
        (
            None,
            4095,
            (
                "data.tokenizer: the embedded tokenizer has 4,096 entries, the model's vocabulary"
                " only 4,095; give"
            ),
        ),
        ("embedded", 100, "data.tokenizer=embedded: the embedded tokenizer has 4,096"),
        ("./gone", 5000, "data.tokenizer=./gone: no such directory, and not a hub id"),
        (
            os.path.dirname(__file__),
            5000,
            f"data.tokenizer={os.path.dirname(__file__)}: this directory holds no tokenizer",
        ),
    ],
)
def test_tokenizers_that_will_not_do(tokenizer: str | None, vocab_size: int, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_tokenizer(Data(tokenizer=tokenizer), Model(weights="random"), vocab_size)
    assert str(caught.value).startswith(expected)


def test_a_damaged_tokenizer_is_one_line(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^data\.tokenizer=.*: can't be loaded \(") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------


def test_packing_is_the_documents_one_after_another(data: Data) -> None:
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    for part, texts in (("train", TEXTS[:27]), ("validation", TEXTS[27:])):
        expected: list[int] = []
        for text in texts:
            expected += [*tokenizer.encode(text).ids, 0]
        directory = prepare(data, "embedded", 4096, part)  # type: ignore[arg-type]
        meta = json.loads((directory / "meta.json").read_text())
        assert np.fromfile(directory / "tokens.bin", np.uint16).tolist() == expected
        assert (meta["tokens"], meta["documents"], meta["dtype"], meta["eos_id"]) == (
            len(expected),
            len(texts),
            "uint16",
            0,
        )
        assert meta["fingerprint"] == directory.name and meta["largest_id"] == max(expected)

        rows = Rows(directory, 16)
        assert len(rows) == (len(expected) - 1) // 16
        batch = rows.batch(range(len(rows)))
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        assert batch.input_ids.flatten().tolist() == expected[: len(rows) * 16]
        assert batch.labels.flatten().tolist() == expected[1 : len(rows) * 16 + 1]
        assert {i: n for i, n in enumerate(rows.counts.tolist()) if n} == Counter(expected)


def test_batches_do_not_show_in_the_tokens(data: Data, monkeypatch) -> None:
    whole = (prepare(data, "embedded", 4096, "train") / "tokens.bin").read_bytes()
    monkeypatch.setattr("tp_trainer.data.tokens.BATCH_CHARACTERS", 100)
    data.cache_dir = f"{data.cache_dir}2"
    assert (prepare(data, "embedded", 4096, "train") / "tokens.bin").read_bytes() == whole


def test_padding_rows_do_not_count(data: Data) -> None:
    for rows in (Rows(prepare(data, "embedded", 4096, "train"), 8), RandomRows(50, 8, seed=1)):
        batch = rows.batch([2, -1])
        assert (
            batch.input_ids[1].tolist() == [0] * 8
            and batch.labels[1].tolist() == [IGNORE_INDEX] * 8
        )
        assert torch.equal(batch.input_ids[:1], rows.batch([2]).input_ids)
        with pytest.raises(IndexError):
            rows.batch([len(rows)])


def test_the_last_row_needs_one_token_more(tmp_path) -> None:
    for number, rows in ((8, 1), (9, 2), (12, 2), (13, 3), (4, 0)):
        np.arange(number, dtype=np.uint32).tofile(tmp_path / "tokens.bin")
        (tmp_path / "meta.json").write_text(json.dumps({"tokens": number, "dtype": "uint32"}))
        assert len(Rows(tmp_path, 4)) == rows


def test_big_vocabularies_take_four_bytes(data: Data, tmp_path) -> None:
    words = {"?": 0, **{f"w{i}": i for i in range(1, 2**16)}}
    small = word_tokenizer(tmp_path / "small", words)
    big = word_tokenizer(tmp_path / "big", {**words, "whales": 2**16})
    small_meta, big_meta = (
        json.loads((prepare(data, name, 2**17, "train") / "meta.json").read_text())
        for name in (small, big)
    )
    assert (small_meta["dtype"], big_meta["dtype"]) == ("uint16", "uint32")
    assert 2**16 in Rows(prepare(data, big, 2**17, "train"), 4).tokens
    assert small_meta["eos_id"] is None and small_meta["tokens"] == sum(
        len(text.split()) for text in TEXTS[:27]
    )


def test_eos_is_not_doubled(data: Data, tmp_path) -> None:
    name = word_tokenizer(tmp_path / "words", {"?": 0, "end": 1}, eos_token="end")
    Path(data.name or "").write_text('{"text": "a b end"}\n{"text": "a b"}\n')
    assert Rows(prepare(data, name, 2, "train"), 1).tokens.tolist() == [0, 0, 1]
    assert Rows(prepare(data, name, 2, "validation"), 1).tokens.tolist() == [0, 0, 1]


def test_ids_beyond_the_vocabulary_also_on_a_second_call(data: Data) -> None:
    prepare(data, "embedded", 4096, "train")
    with pytest.raises(
        ConfigError,
        match=(
            r"^data\.tokenizer=embedded: gives token id [\d,]+, the model's vocabulary has only"
            r" 300; give"
        ),
    ):
        prepare(data, "embedded", 300, "train")


def test_no_text_leaves_nothing_behind(data: Data, tmp_path) -> None:
    Path(data.name or "").write_text('{"text": " "}\n{"text": ""}\n')
    with pytest.raises(ConfigError, match=r"^data\.name=.*: the train part has no text; check"):
        prepare(data, "embedded", 4096, "train")
    assert os.listdir(tmp_path / "cache") == []


def test_cache_that_cannot_be_written(data: Data, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    data.cache_dir = str(tmp_path / "file")
    with pytest.raises(
        ConfigError, match=r"^data\.cache_dir=.*: can't write to .*; give another one"
    ):
        prepare(data, "embedded", 4096, "train")


def test_made_once_and_again_only_for_what_shapes_the_tokens(
    data: Data, tmp_path, monkeypatch
) -> None:
    first = prepare(data, "embedded", 4096, "train")
    with monkeypatch.context() as patch:
        patch.setattr(
            "tp_trainer.data.tokens.load_tokenizer", lambda *_: pytest.fail("tokenised again")
        )
        data.seq_length, data.shuffle = 7, False
        assert prepare(data, "embedded", 5000, "train") == first
    made = {
        first,
        prepare(data, "embedded", 4096, "validation"),
        prepare(data, word_tokenizer(tmp_path / "w", {"?": 0}), 4096, "train"),
    }
    # same path, other content
    made.add(prepare(data, word_tokenizer(tmp_path / "w", {"?": 0, "of": 1}), 4096, "train"))
    data.percentage = 50
    made.add(prepare(data, "embedded", 4096, "train"))
    data.percentage = 100
    os.utime(str(data.name), ns=(1, 1))
    made.add(prepare(data, "embedded", 4096, "train"))
    assert len(made) == 6


def test_a_damaged_cache_is_made_again(data: Data) -> None:
    directory = prepare(data, "embedded", 4096, "train")
    whole = (directory / "tokens.bin").read_bytes()
    (directory / "tokens.bin").write_bytes(whole[:-2])
    assert (prepare(data, "embedded", 4096, "train") / "tokens.bin").read_bytes() == whole
    (directory / "meta.json").unlink()
    assert (prepare(data, "embedded", 4096, "train") / "tokens.bin").read_bytes() == whole


def test_the_first_one_stays(data: Data, monkeypatch) -> None:
    first = prepare(data, "embedded", 4096, "train")
    inode = first.stat().st_ino
    # as if the other process finished after this one had looked
    complete, answers = tokens._complete, iter([False])
    monkeypatch.setattr(
        tokens, "_complete", lambda directory: next(answers, None) is None and complete(directory)
    )
    assert prepare(data, "embedded", 4096, "train").stat().st_ino == inode, (
        "others may have mapped the first one's file"
    )
    assert os.listdir(str(data.cache_dir)) == [first.name]


RACER = """
import sys, time, os
from tp_trainer.config import Data
from tp_trainer.data import tokens
me, other, name, cache = sys.argv[1:]
tokenise = tokens._tokenise
def both_at_once(*arguments):
    tokenise(*arguments)
    open(me, "w").close()
    while not os.path.exists(other):  # neither publishes before both have made theirs
        time.sleep(0.001)
tokens._tokenise = both_at_once
print(tokens.prepare(Data(source="jsonl", name=name, cache_dir=cache), "embedded", 4096, "train"))
"""


def test_two_processes_at_once(data: Data, tmp_path) -> None:
    flags = [str(tmp_path / "one"), str(tmp_path / "two")]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, *pair, str(data.name), str(data.cache_dir)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for pair in (flags, flags[::-1])
    ]
    found = [racer.communicate()[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert found[0] == found[1] != ""
    directory = Path(found[0].strip())
    assert os.listdir(str(data.cache_dir)) == [directory.name]
    meta = json.loads((directory / "meta.json").read_text())
    assert (directory / "tokens.bin").stat().st_size == 2 * meta["tokens"] > 0


# ------------------------------------------------------------------------------------------------ r


def test_random_rows_are_a_function_of_seed_and_index() -> None:
    rows = RandomRows(100, 64, seed=3, rows=1000)
    batch = rows.batch([5, 999, 5])
    assert len(rows) == 1000 and batch.input_ids.shape == (3, 64)
    assert torch.equal(batch.input_ids[0], batch.input_ids[2])
    assert not torch.equal(batch.input_ids[0], batch.input_ids[1])
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    assert torch.equal(RandomRows(100, 64, seed=3).batch([999]).labels[0], batch.labels[1])
    assert not torch.equal(RandomRows(100, 64, seed=4).batch([5]).input_ids[0], batch.input_ids[0])
    drawn = rows.batch(range(200)).input_ids
    assert drawn.min() == 0 and drawn.max() == 99
    assert abs(drawn.double().mean() - 49.5) < 1.5


def test_unigram_loss_by_hand() -> None:
    # counts + 1 of four ids after [0 0 0 1]: 4, 2, 1, 1 of 8
    expected = -(math.log(4 / 8) + math.log(2 / 8) + 2 * math.log(1 / 8)) / 4
    assert unigram_loss(np.array([0, 0, 0, 1]), np.array([0, 1, 2, 3]), 4) == pytest.approx(
        expected, rel=1e-12
    )
    assert unigram_loss(np.array([], np.int64), np.array([2, 2]), 4096) == pytest.approx(
        math.log(4096)
    )


def test_unigram_loss_of_the_embedded_text(tmp_path) -> None:
    data = Data(source="embedded", cache_dir=str(tmp_path))
    training, validation = (
        Rows(prepare(data, "embedded", 4096, part), 128) for part in ("train", "validation")
    )  # type: ignore[arg-type]
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    seen, asked = (
        [id for text in documents(data, part) for id in [*tokenizer.encode(text).ids, 0]]
        for part in ("train", "validation")
    )  # type: ignore[arg-type]
    counts = Counter(seen)
    expected = sum(-math.log((counts[id] + 1) / (len(seen) + 4096)) for id in asked) / len(asked)
    assert unigram_loss(training.tokens, validation.tokens, 4096) == pytest.approx(
        expected, rel=1e-9
    )
    assert unigram_loss_of_counts(training.counts, validation.counts, 4096) == pytest.approx(
        expected, rel=1e-9
    )
    assert 6.6 < expected < 6.8
