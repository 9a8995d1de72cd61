"""What was found of the data, what makes a token file another one, and how documents begin and
end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from tp_trainer.assets import TOKENIZER
from tp_trainer.config import Config, ConfigError, Data, Model, check_same_tokens, load
from tp_trainer.config.identity import choices
from tp_trainer.data import DataStream, open_data
from tp_trainer.data.sources import Skipped, Source, check_source, documents
from tp_trainer.data.tokenizer import choose_tokenizer, encoder, load_tokenizer
from tp_trainer.data.tokens import prepare
from tp_trainer.view import data_lines

ARCHITECTURE: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
WORDS = {"?": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}


def config(tmp_path: Path, **data: Any) -> Config:
    data = {"seq_length": 8, "cache_dir": str(tmp_path / "cache"), **data}
    return load(
        {
            "model": {"architecture": dict(ARCHITECTURE)},
            "data": data,
            "train": {"micro_batch_size": 1},
        }
    )


def opened(config: Config, tokenizer: str = "embedded") -> DataStream:
    return open_data(
        config, tokenizer=tokenizer, dp_rank=0, dp_size=1, first_on_node=lambda make: make()
    )


def lines(path: Path, *texts: str | None) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


# ----------------------------------------------------------------------------------- what was found


def test_what_was_found_is_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = lines(
        tmp_path / "in" / "a.jsonl", "one whale", None, "", " \n ", None, "two ships and more", ""
    )
    second = lines(
        tmp_path / "in" / "b.jsonl",
        "three harpoons in the sea",
        "four men on the coast of the sea",
        "",
        "five whales in all of it",
    )
    (tmp_path / "in" / "sub").mkdir()
    for name in ("README.md", "notes.txt", "z.csv"):
        (tmp_path / "in" / name).write_text("x")
    run = config(
        tmp_path, name=str(tmp_path / "in"), source="jsonl", validation_percentage=20, seq_length=6
    )
    found = opened(run).found
    assert {
        key: found[key]
        for key in (
            "source",
            "name",
            "tokenizer",
            "revision",
            "files",
            "files_ignored",
            "first_ignored",
        )
    } == {
        "source": "jsonl",
        "name": str(tmp_path / "in"),
        "tokenizer": "embedded",
        "revision": None,
        "files": 2,
        "files_ignored": 4,
        "first_ignored": ["README.md", "notes.txt", "sub/"],
    }
    train, validation, tokenizer = found["train"], found["validation"], load_tokenizer("embedded")
    # 11 lines, 2 of them held out
    assert (train["documents"], validation["documents"]) == (4, 1)
    assert (train["documents_skipped"], train["skipped"]) == (
        5,
        {"null": 2, "empty": 2, "blank": 1},
    )
    assert train["first_skipped"] == [f"{first}:{number}" for number in (2, 3, 4)]
    assert (validation["documents_skipped"], validation["first_skipped"]) == (1, [f"{second}:3"])
    kept = [
        "one whale",
        "two ships and more",
        "three harpoons in the sea",
        "four men on the coast of the sea",
    ]
    tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in kept)
    rows = (tokens - 1) // 6
    assert (train["tokens"], train["rows"], train["tokens_dropped"]) == (
        tokens,
        rows,
        tokens - (6 * rows + 1),
    )
    lines_said = data_lines(found)
    assert (
        len(lines_said) == 2
        and f"2 files; skipped 6 (2 null, 3 empty, 1 blank): {first}:2, {first}:3, {first}:4, ..."
        in lines_said[0]
    )
    assert lines_said[0].endswith("; ignored 4: README.md, notes.txt, sub/, ...")
    assert (
        f"train 4 documents, {tokens:,} tokens, {rows:,} rows "
        f"({train['tokens_dropped']} tokens left over at the end)" in lines_said[1]
    )

    with monkeypatch.context() as patch:  # from the cache, too; what lies beside is as it is now
        patch.setattr(
            "tp_trainer.data.tokens.load_tokenizer", lambda *_: pytest.fail("tokenised again")
        )
        (tmp_path / "in" / "z.csv").unlink()
        again = opened(run).found
    assert again == {**found, "files_ignored": 3}


def test_of_random_and_embedded_data(tmp_path: Path) -> None:
    assert opened(config(tmp_path, source="random"), "none").found == {"source": "random"}
    assert "random tokens" in data_lines({"source": "random"})[0]
    found = opened(config(tmp_path)).found
    chapters = len(list(documents(Data(source="embedded"), "train")))
    assert (
        found["source"],
        found["files"],
        found["files_ignored"],
        found["train"]["documents"],
    ) == ("embedded", 1, 0, chapters)


def test_blank_files_of_text(tmp_path: Path) -> None:
    for name, text in (
        ("a.txt", "one"),
        ("b.txt", ""),
        ("c.txt", " \n"),
        ("d.txt", "two"),
        ("e.txt", "three"),
    ):
        (tmp_path / name).write_text(text)
    skipped = Skipped()
    assert list(Source(Data(source="text", name=str(tmp_path))).documents("train", skipped)) == [
        "one",
        "two",
    ]
    assert dict(skipped.counts) == {"empty": 1, "blank": 1}
    assert skipped.first == [f"{tmp_path}/b.txt", f"{tmp_path}/c.txt"]


def test_no_text_at_all_says_which_documents(tmp_path: Path) -> None:
    run = config(tmp_path, name=str(lines(tmp_path / "a.jsonl", None, "", "x")))
    with pytest.raises(
        ConfigError,
        match=r"the train part has no text; .* \(2 of its documents .*a\.jsonl:1, .*a\.jsonl:2\)",
    ):
        opened(run)


@pytest.mark.parametrize("percentage", [50, 10])
def test_percentage_of_a_single_document(tmp_path: Path, percentage: int) -> None:
    """It was not honoured."""
    (tmp_path / "a.txt").write_text(" ".join(f"w{i:04d}" for i in range(1000)))
    whole, some = (
        "".join(
            Source(Data(source="text", name=str(tmp_path / "a.txt"), percentage=each)).documents(
                "train", Skipped()
            )
        )
        for each in (100, percentage)
    )
    assert whole.startswith(some) and abs(len(some) / len(whole) - percentage / 100) < 0.01


# ---------------------------------------------------------------------------- which tokens they are


def changed(data: Data, tokenizer: str = "embedded", trust: bool = False) -> str:
    return prepare(data, tokenizer, 2**20, "train", trust).name


def test_a_file_that_was_changed_with_its_size_and_time_kept(tmp_path: Path) -> None:
    """As by cp -p."""
    path = lines(tmp_path / "a.jsonl", "one whale", "two whales")
    data = Data(source="jsonl", name=str(path), cache_dir=str(tmp_path / "cache"))
    before, times = changed(data), path.stat()
    lines(path, "one squid", "two whales")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    assert changed(data) != before


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lines(tmp_path / "a.jsonl", "one whale", "two whales")
    data = Data(source="jsonl", name=str(path), cache_dir=str(tmp_path / "cache"))
    real = load_tokenizer
    monkeypatch.setattr(
        "tp_trainer.data.tokens.load_tokenizer",
        lambda *_: (lines(path, "other", "text"), real("embedded"))[1],
    )
    with pytest.raises(ConfigError, match="was changed while it was read"):
        changed(data)
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("name", "trust", "same"),
    [
        ("config.json", False, False),
        ("merges.bpe", False, False),
        ("tekken.json", False, False),
        ("any.spm", False, False),
        ("added_tokens.json", False, False),
        ("tokenization_own.py", False, False),
        ("code/deeper.py", True, False),
        ("code/deeper.py", False, True),
        ("model.safetensors", False, True),
        ("pytorch_model.bin", False, True),
        ("model.safetensors.index.json", False, True),
    ],
)
def test_which_files_of_a_tokenizer_count(
    tmp_path: Path, name: str, trust: bool, same: bool
) -> None:
    data = Data(
        source="jsonl",
        name=str(lines(tmp_path / "a.jsonl", "one", "two")),
        cache_dir=str(tmp_path / "cache"),
    )
    directory = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, directory)
    before = changed(data, str(directory), trust)
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_text("{}")
    assert (changed(data, str(directory), trust) == before) == same


def test_a_hub_tokenizer_counts_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(
        source="jsonl",
        name=str(lines(tmp_path / "a.jsonl", "one", "two")),
        cache_dir=str(tmp_path / "cache"),
    )
    asked: list[tuple[Any, ...]] = []

    def loading(*arguments: Any) -> Any:
        asked.append(arguments)
        return load_tokenizer("embedded")

    commits: list[str | None] = ["c1", "c2", None]
    monkeypatch.setattr("tp_trainer.data.tokenizer.commit", lambda name: commits[0])
    monkeypatch.setattr("tp_trainer.data.tokens.load_tokenizer", loading)
    first = changed(data, "owner/model")
    assert changed(data, "owner/model") == first and asked == [("owner/model", False, "c1")]
    del commits[0]
    second = changed(data, "owner/model")
    assert second != first and asked[1:] == [("owner/model", False, "c2")]
    del commits[0]
    os.utime(tmp_path / "cache" / first / "meta.json", (1, 1))
    assert changed(data, "owner/model") == second, "without a network, the newest one that was made"
    assert changed(Data(**{**vars(data), "percentage": 50}), "owner/model") not in (first, second)


def test_the_commit_of_a_kept_hub_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub keeps it, without a network."""
    from tp_trainer.data.tokenizer import commit

    sha = "0123456789abcdef0123456789abcdef01234567"
    kept = tmp_path / "hub" / "models--owner--kept"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(sha)
    shutil.copytree(TOKENIZER, kept / "snapshots" / sha)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert commit("owner/kept") == sha
    assert commit("owner/not-kept") is None


# ------------------------------------------------------------------------------- the hub's revision

NEW, OLD = "b" * 40, "a" * 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub with one dataset of two commits, as datasets' builders show it."""
    import datasets

    texts = {NEW: [f"new {i}" for i in range(10)], OLD: [f"old {i}" for i in range(10)]}
    state = SimpleNamespace(newest=NEW, offline=False, kept=None, asked=[])

    class Builder:
        def __init__(self, commit: str) -> None:
            self.hash = commit

        def download_and_prepare(self) -> None:
            state.asked.append(self.hash)

        def as_dataset(self, split: str) -> Any:
            return datasets.Dataset.from_dict({"text": texts[self.hash]})

    class Cache(Builder):
        __module__ = "datasets.packaged_modules.cache.cache"

    def load(name: str, subset: str | None, revision: str | None = None) -> Builder:
        if state.offline:
            if state.kept is None:
                raise ConnectionError(f"Couldn't reach '{name}' on the Hub")
            return Cache(state.kept)
        return Builder(
            {None: state.newest, "main": state.newest, "v1": OLD}.get(revision, str(revision))
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    return state


def of_hub(tmp_path: Path, **data: Any) -> DataStream:
    return opened(
        config(
            tmp_path, **{"name": "owner/set", "seq_length": 4, "validation_percentage": 30, **data}
        )
    )


def test_a_dataset_that_moved_is_tokenised_anew(tmp_path: Path, hub: SimpleNamespace) -> None:
    hub.newest = OLD
    old = of_hub(tmp_path)
    assert (old.found["revision"], of_hub(tmp_path).found, hub.asked) == (
        OLD,
        old.found,
        [OLD, OLD],
    ), "each part once"
    hub.newest = NEW
    new = of_hub(tmp_path)
    assert (
        new.found["revision"] == NEW
        and new.train.identity != old.train.identity
        and hub.asked[2:] == [NEW, NEW]
    )
    assert f"at {NEW}" in data_lines(new.found)[0]
    for revision in ("v1", OLD):
        pinned = of_hub(tmp_path, revision=revision)
        assert (pinned.found["revision"], pinned.train.identity) == (OLD, old.train.identity)
    assert len(hub.asked) == 4, "nothing was tokenised twice"
    moved = config(tmp_path, name="owner/set")
    with pytest.raises(
        ConfigError,
        match=r"other tokens than there .*; give data\.revision=<the commit it was trained on>, ",
    ):
        check_same_tokens(moved, new.train.identity, old.train.identity, "there")


def test_without_a_network_the_kept_commit_is_read(tmp_path: Path, hub: SimpleNamespace) -> None:
    hub.offline, hub.kept = True, OLD
    assert of_hub(tmp_path).found["revision"] == OLD
    assert of_hub(tmp_path, revision=OLD).found["revision"] == OLD
    for revision in ("v1", NEW):
        with pytest.raises(
            ConfigError,
            match=rf"^data\.revision={revision}: can't be had without the hub; .* commit {OLD}:",
        ):
            of_hub(tmp_path, revision=revision)


def test_without_a_network_and_without_a_dataset(tmp_path: Path, hub: SimpleNamespace) -> None:
    made = of_hub(tmp_path)
    hub.offline = True
    assert of_hub(tmp_path).found == made.found, "the token file is there"
    assert of_hub(tmp_path, revision=NEW).found == made.found
    with pytest.raises(ConfigError, match=r"^data\.name=owner/set: can't be loaded"):
        of_hub(tmp_path, percentage=50)


def test_the_revision_belongs_to_the_runs_name_where_it_is_given(tmp_path: Path) -> None:
    """Of runs without one, the names are those of before there was the key."""
    given = [config(tmp_path, name="owner/set", revision=each) for each in (None, OLD, NEW)]
    assert len({each.experiment_name for each in given}) == 3
    assert ["revision" in choices(each)["data"] for each in given] == [False, True, True]


# --------------------------------------------------------------- directories that the library reads


def test_a_dataset_that_save_to_disk_wrote(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"body": [f"whale number {i} of the sea" for i in range(20)]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    found = opened(config(tmp_path, name=str(tmp_path / "saved"), text_column="body")).found
    assert (found["source"], found["train"]["documents"], found["validation"]["documents"]) == (
        "hub",
        19,
        1,
    )
    check_source(config(tmp_path, name=str(tmp_path / "saved"), text_column="body").data)


# ------------------------------------------------------------------------------------ begin and end


def tokenizer_of(directory: Path, single: str | None = None, **special: str) -> str:
    """A tokenizer of words, with what it puts around a text."""
    made = Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>"])
    if single:
        made.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    directory.mkdir(exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    return str(directory)


@pytest.mark.parametrize(
    ("single", "expected"),
    [
        (None, [[3, 2], [1, 3, 2], [3, 2], [1, 3, 2], [1, 2]]),
        ("<s> $A", [[1, 3, 2], [1, 3, 2], [1, 3, 2], [1, 3, 2], [1, 2]]),
        ("<s> $A </s>", [[1, 3, 2], [1, 3, 2], [1, 3, 2], [1, 3, 2], [1, 2]]),
        ("$A </s>", [[3, 2], [1, 3, 2], [3, 2], [1, 3, 2], [1, 2]]),
    ],
)
def test_each_document_begins_and_ends_once(
    tmp_path: Path, single: str | None, expected: list[list[int]]
) -> None:
    name = tokenizer_of(tmp_path / "words", single, bos_token="<s>", eos_token="</s>")
    texts = ["a", "<s> a", "a </s>", "<s>a</s>", "<s>"]
    assert encoder(load_tokenizer(name))(texts) == expected
    data = Data(
        source="jsonl",
        name=str(lines(tmp_path / "a.jsonl", *texts, "b")),
        cache_dir=str(tmp_path / "cache"),
    )
    meta = json.loads((prepare(data, name, 5, "train") / "meta.json").read_text())
    assert meta["tokens"] == sum(map(len, expected))


def test_a_tokenizer_of_real_text_that_adds_bos(tmp_path: Path) -> None:
    made = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    made.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    ids = encoder(load_tokenizer(str(tmp_path)))
    plain = AutoTokenizer.from_pretrained(TOKENIZER)("Call me Ishmael.")["input_ids"]
    texts = [
        "Call me Ishmael.",
        "<|endoftext|>Call me Ishmael.",
        "<|endoftext|>Call me Ishmael.<|endoftext|>",
    ]
    assert ids(texts) == [[0, *plain, 0]] * 3


# ---------------------------------------------------------------------------------- which tokenizer


def test_pretrained_weights_without_a_tokenizer(tmp_path: Path) -> None:
    """Their ids mean what their own tokenizer says: the embedded one's would be noise."""
    (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURE))
    (tmp_path / "generation_config.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        choose_tokenizer(Data(), Model(name=str(tmp_path), weights="pretrained"), 4096)
    assert str(caught.value).startswith(
        f"data.tokenizer: {tmp_path} holds no tokenizer; give data.tokenizer=<hub id or directory>"
    )
    assert str(caught.value).endswith("or data.tokenizer=embedded")
    assert choose_tokenizer(
        Data(tokenizer="embedded"), Model(name=str(tmp_path), weights="pretrained"), 4096
    ) == ("embedded", None)
    assert choose_tokenizer(
        Data(source="random"), Model(name=str(tmp_path), weights="pretrained"), 4096
    ) == ("none", None)
    chosen, notice = choose_tokenizer(Data(), Model(name=str(tmp_path), weights="random"), 4096)
    assert chosen == "embedded" and str(tmp_path) in str(notice)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tekken.json",
        "sentencepiece.bpe.model",
        "vocab.json",
        "qwen.tiktoken",
        "merges.bpe",
    ],
)
def test_tokenizers_by_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    assert choose_tokenizer(Data(), Model(name=str(tmp_path), weights="pretrained"), 4096) == (
        str(tmp_path),
        None,
    )


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gemma"])
def test_a_tokenizer_that_is_made_of_nothing(tmp_path: Path, model_type: str) -> None:
    """transformers makes an empty one of config.json alone: every text would be no tokens."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"^data\.tokenizer=.*: (holds no vocabulary|can't be loaded)"
    ):
        load_tokenizer(str(tmp_path))


def test_a_tokenizers_file_is_not_its_directory(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=rf"is a file; give its directory: data\.tokenizer={tmp_path}"
    ):
        choose_tokenizer(Data(tokenizer=str(tmp_path / "tokenizer.json")), Model(), 4096)
