"""The embedded text and its tokenizer."""

import json

import pytest

from tp_trainer.assets import TEXT, TOKENIZER, TOKENIZER_SIZE
from tp_trainer.assets.train_tokenizer import save, train
from tp_trainer.config import Data
from tp_trainer.data.sources import documents
from tp_trainer.data.tokenizer import load_tokenizer

EMBEDDED = Data(source="embedded")


def test_parts_are_the_whole_text_cut_near_ninety_percent() -> None:
    text = TEXT.read_text(encoding="utf-8")
    training, validation = ("".join(documents(EMBEDDED, part)) for part in ("train", "validation"))
    assert training + validation == text
    assert abs(len(training) / len(text) - 0.9) < 0.002
    assert training.endswith("\n\n")


def test_documents_are_chapters() -> None:
    training, validation = (
        list(documents(EMBEDDED, "train")),
        list(documents(EMBEDDED, "validation")),
    )
    assert all(text.startswith("CHAPTER ") for text in training + validation[1:])
    assert sum(text.startswith("CHAPTER ") for text in training + validation) == 135
    assert max(text.count("\nCHAPTER ") for text in training + validation) == 0


@pytest.mark.parametrize(
    "text",
    ["Call me Ishmael.", "  two  spaces\n\ttab , comma \r\n", "naïve — 鯨 🐋 \x00", "‘Tis\u2028"],
)
def test_round_trip(text: str) -> None:
    tokenizer = load_tokenizer("embedded")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_entries_and_end_of_text() -> None:
    tokenizer = load_tokenizer("embedded")
    assert len(tokenizer) == TOKENIZER_SIZE == 4096
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 0
    assert tokenizer("whale whale<|endoftext|>")["input_ids"].count(0) == 1
    assert 0 not in tokenizer("whale")["input_ids"]


def test_packaged_files_come_from_the_training_part_alone(tmp_path) -> None:
    save(train(documents(EMBEDDED, "train")), tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (TOKENIZER / name).read_bytes()
    everything = train([*documents(EMBEDDED, "train"), *documents(EMBEDDED, "validation")])
    packaged = json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"]
    assert everything.get_vocab() != packaged, (
        "a tokenizer that saw the validation part would look different"
    )
