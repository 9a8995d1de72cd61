"""What data.name means: the source that follows from it, and what contradicts one that was
typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tp_trainer.config import Config, ConfigError, Data, load, plain
from tp_trainer.config.files import listed
from tp_trainer.config.source import check_data
from tp_trainer.data.sources import check_source

JSON, TEXT = '{"text": "one whale"}\n', "one whale\n"
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


def loaded(**data: Any) -> Config:
    return load({"model": {"architecture": dict(ARCHITECTURE)}, "data": data})


def refusal(**data: Any) -> str:
    """What the driver says, at composition or in preflight, in one line."""
    with pytest.raises(ConfigError) as caught:
        check_source(loaded(**data).data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a file of each kind, and directories of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    files = {
        "a.jsonl": JSON,
        "UPPER.JSONL": JSON,
        "a.ndjson": JSON,
        "a.txt": TEXT,
        "UPPER.TXT": TEXT,
        "lines.txt": JSON,
        "a.json": f"[{JSON}]",
        "lines.json": JSON,
        "a.csv": "text\none\n",
        "a.parquet": "PAR1",
        "a.jsonl.gz": "x",
        "a.md": TEXT,
        "bare": TEXT,
        "json/a.jsonl": JSON,
        "json/b.jsonl": JSON,
        "json/README.md": TEXT,
        "text/a.txt": TEXT,
        "text/b.TXT": TEXT,
        "both/a.jsonl": JSON,
        "both/a.txt": TEXT,
        "lines/a.txt": JSON,
        "table/train.parquet": "PAR1",
        "deep/data/train.csv": "text\none\n",
        "saved/state.json": "{}",
        "deeper/sub/a.jsonl": JSON,
        "other/a.pdf": "x",
        "[odd]/a.jsonl": JSON,
        "owner/there.txt": TEXT,
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(content)
    (tmp_path / "empty").mkdir()
    return tmp_path


# ------------------------------------------------------------------------------- the source follows


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (None, "embedded"),
        ("a.jsonl", "jsonl"),
        ("UPPER.JSONL", "jsonl"),
        ("a.ndjson", "jsonl"),
        ("./a.jsonl", "jsonl"),
        ("~/a.jsonl", "jsonl"),
        ("*.jsonl", "jsonl"),
        ("**/b.jsonl", "jsonl"),
        ("json", "jsonl"),
        ("json/", "jsonl"),
        ("~/json", "jsonl"),
        ("[odd]", "jsonl"),
        ("[odd]/a.jsonl", "jsonl"),
        ("a.txt", "text"),
        ("UPPER.TXT", "text"),
        ("text", "text"),
        ("text/*", "text"),
        ("table", "hub"),
        ("deep", "hub"),
        ("saved", "hub"),
        ("Salesforce/wikitext", "hub"),
        ("wikitext", "hub"),
        ("no-owner/data.v1", "hub"),
        ("a.csv", "hub"),
        ("./a.json", "hub"),
        ("~/lines.json", "hub"),
        ("a.parquet", "hub"),
    ],
)
def test_the_source_follows_from_the_name(name: str | None, source: str) -> None:
    assert loaded(name=name).data.source == source == loaded(name=name, source=None).data.source


def test_it_is_settled_before_the_name_of_the_run_and_kept() -> None:
    config = loaded(name="a.jsonl")
    assert config.experiment_name == loaded(name="a.jsonl", source="jsonl").experiment_name
    assert load(plain(config)) == config and plain(config)["data"]["source"] == "jsonl"
    assert loaded().experiment_name == loaded(source="embedded").experiment_name


def test_an_export_reads_no_data() -> None:
    assert load(
        {
            "task": "export",
            "model": {"architecture": dict(ARCHITECTURE)},
            "data": {"name": "/gone.jsonl"},
        }
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/nope.jsonl", "no such file or directory"),
        ("nope.txt", "no such file or directory"),
        ("./nope", "no such file or directory"),
        ("a/b/c", "no such file or directory"),
        ("owner/gone", "no such file or directory"),  # the directory owner is there
        ("owner/gone", "for a dataset of the hub type data.source=hub"),
        ("*.jsonlx", "no file matches this glob"),
        ("a.jsonl,a.txt", "several files are one glob or one directory"),
        ("", "is empty"),
        (" ", "is empty"),
        ("not an id", "not a hub id"),
        ("both", "type data=jsonl (or data.source=jsonl) or data=text (or data.source=text)"),
        ("both", "1 *.jsonl and 1 *.txt"),
        ("*.*", "files of different kinds"),
        ("lines.txt", "holds JSON lines, whatever its suffix says; type data=jsonl"),
        ("lines", "a.txt holds JSON lines"),
        (
            "*.csv",
            "data.source=hub data.name=a.csv, its directory with data.source=hub data.name=.",
        ),
        ("a.jsonl.gz", "is packed; unpack it"),
        ("a.md", "type data=text (or data.source=text) or data=jsonl"),
        ("bare", "type data=text"),
        ("deeper", "data.name='deeper/**/*.jsonl'"),
        ("other", "no *.jsonl, no *.txt and no saved dataset"),
        ("empty", "no *.jsonl, no *.txt and no saved dataset"),
        ("s3://bucket/a.jsonl", "URLs aren't read; copy it"),
        ("hf://datasets/owner/set", "type data.name=owner/set"),
        ("https://hub.example/datasets/owner/set", "type data.name=owner/set"),
        ("owner/set@v1", "type data.name=owner/set data.revision=v1"),
        ("owner/set:en", "type data.name=owner/set data.subset=en"),
        ("random", "type data=random (or data.source=random)"),
    ],
)
def test_names_from_which_none_follows(name: str, says: str) -> None:
    assert says in (found := refusal(name=name)) and found.startswith(f"data.name={name}: "), found


# ------------------------------------------------------------------------------ what contradicts it


@pytest.mark.parametrize(
    ("source", "name", "says"),
    [
        ("text", "a.jsonl", "type data=jsonl"),
        ("text", "UPPER.JSONL", "type data=jsonl"),
        ("text", "a.ndjson", "type data=jsonl"),
        ("text", "nope.jsonl", "type data=jsonl"),
        ("text", "*.jsonl", "type data=jsonl"),
        ("text", "json", "no *.txt file; type data=jsonl"),
        ("text", "both/*", "both/a.jsonl is JSON lines"),
        ("text", "a.json", "data.source=hub data.name=."),
        ("text", "a.csv", "data.source=hub"),
        ("text", "a.jsonl.gz", "is packed"),
        ("jsonl", "a.txt", "is plain text, not JSON lines; type data=text"),
        ("jsonl", "text", "no *.jsonl file; type data=text"),
        ("jsonl", "text/*.txt", "is plain text, not JSON lines; type data=text"),
        ("jsonl", "a.parquet", "data.source=hub data.name=."),
        ("jsonl", "a.json", "is not JSON"),
        ("jsonl", "owner/set", "for a dataset of the hub type data.source=hub"),
        ("jsonl", "deeper", "data.name='deeper/**/*.jsonl'"),
        ("jsonl", "s3://bucket/a.jsonl", "URLs aren't read"),
        ("hub", "a.jsonl", "type data=jsonl"),
        ("hub", "/nope.jsonl", "type data=jsonl"),
        ("hub", "a.txt", "type data=text"),
        ("hub", "a.parquet", "a.parquet can't be read (Parquet file size is 4 bytes"),
        ("hub", "gone.csv", "no such file or directory"),
        ("hub", "*.csv", "data.source=hub data.name=."),
        ("hub", "*.jsonl", "type data=jsonl"),
        ("hub", "/nope", "no such directory, and not a hub id"),
        ("embedded", "/nope.jsonl", "type data=jsonl"),
        ("embedded", "a.txt", "type data=text"),
        ("embedded", "Salesforce/wikitext", "type data.source=hub"),
        ("embedded", "/nope", "no such file or directory"),
        ("random", "json", "type data=jsonl"),
        ("random", "owner/set", "type data.source=hub"),
    ],
)
def test_names_against_the_typed_source(source: str, name: str, says: str) -> None:
    assert says in (found := refusal(source=source, name=name)) and found.startswith(
        f"data.name={name}: "
    ), found


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("jsonl", "lines.txt"),
        ("jsonl", "lines.json"),
        ("text", "lines.txt"),
        ("text", "a.md"),
        ("text", "bare"),
        ("jsonl", "both"),
        ("text", "both"),
        ("text", "lines"),
    ],
)
def test_a_typed_source_is_the_users_word(source: str, name: str) -> None:
    check_source(loaded(source=source, name=name).data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            {"subset": "en"},
            (
                "data.subset=en: data.source=embedded doesn't read it; leave it out, "
                "or give data.subset=null"
            ),
        ),
        ({"text_column": "body"}, "data.text_column=body: data.source=embedded doesn't read it"),
        (
            {"validation_percentage": 20},
            (
                "data.validation_percentage=20.0: data.source=embedded doesn't read it "
                "(its text is cut 90/10)"
            ),
        ),
        ({"name": "a.txt", "text_column": "body"}, "data.text_column=body: data.source=text"),
        (
            {"name": "a.txt", "split": "test"},
            (
                "data.split=test: data.source=text doesn't read it; leave it out, "
                "or give data.split=train"
            ),
        ),
        ({"name": "a.jsonl", "split": "test"}, "data.split=test: data.source=jsonl"),
        ({"name": "a.jsonl", "subset": "en"}, "data.subset=en: data.source=jsonl"),
        (
            {"name": "a.jsonl", "validation_split": "test"},
            "data.validation_split=test: data.source=jsonl",
        ),
        ({"name": "a.jsonl", "revision": "v1"}, "data.revision=v1: data.source=jsonl"),
        ({"name": "table", "revision": "v1"}, "data.revision=v1: table is a directory"),
        (
            {"source": "random", "tokenizer": "embedded"},
            "data.tokenizer=embedded: data.source=random",
        ),
        ({"source": "random", "percentage": 10}, "data.percentage=10.0: data.source=random"),
        ({"source": "random", "text_column": "body"}, "data.text_column=body: data.source=random"),
        (
            {"name": "their/set", "validation_split": "test", "validation_percentage": 9},
            "give data.validation_split=null to hold out",
        ),
    ],
)
def test_keys_that_the_source_does_not_read(data: dict[str, Any], says: str) -> None:
    assert says in refusal(**data)


@pytest.mark.parametrize("source", ["embedded", "random"])
def test_what_earlier_runs_saved_still_loads(source: str) -> None:
    """Before there was data.revision, and with what the driver settles."""
    saved = {
        "source": source,
        "name": None,
        "subset": None,
        "split": "train",
        "validation_split": None,
        "validation_percentage": 5.0,
        "text_column": "text",
        "percentage": 100.0,
        "seq_length": 64,
        "shuffle": True,
        "cache_dir": "/cache",
        "tokenizer": "embedded" if source == "embedded" else None,
    }
    assert loaded(**saved).data.source == source


def test_every_key_is_read_by_a_source_or_by_all() -> None:
    check_data(
        Data(
            source="hub",
            name="owner/set",
            subset="s",
            revision="r",
            split="a",
            validation_split="b",
            text_column="c",
            percentage=1,
            tokenizer="t",
            shuffle=False,
            cache_dir="d",
            seq_length=1,
        )
    )


# -------------------------------------------------------------------------------------- the listing


def test_what_lies_beside_is_named(here: Path) -> None:
    (here / "json" / "sub").mkdir()
    (here / "json" / ".hidden.jsonl").write_text(JSON)
    found = listed("json/", "jsonl")
    assert [path.name for path in found.files] == ["a.jsonl", "b.jsonl"]
    assert sorted(found.ignored) == [".hidden.jsonl", "README.md", "sub/"]
    assert [path.name for path in listed("json/*.jsonl", "jsonl").files] == ["a.jsonl", "b.jsonl"]
    assert listed("json/*", "jsonl").ignored == ["json/sub/"]


def test_a_file_that_is_reached_twice_is_read_once(here: Path) -> None:
    (here / "json" / "c.jsonl").symlink_to("a.jsonl")
    (here / "json" / "d.jsonl").hardlink_to(here / "json" / "b.jsonl")
    for name in ("json", "json/*.jsonl", "**/json/**/*.jsonl"):
        found = listed(name, "jsonl")
        assert [path.name for path in found.files] == ["a.jsonl", "b.jsonl"], name
        assert {"c.jsonl (the same file as a.jsonl)", "d.jsonl (the same file as b.jsonl)"} <= set(
            found.ignored
        )


def test_a_link_to_nothing_is_refused(here: Path) -> None:
    (here / "json" / "c.jsonl").symlink_to("gone.jsonl")
    for name in ("json", "json/*"):
        assert "json/c.jsonl is a link to nothing" in refusal(name=name)


def test_each_file_is_looked_at(here: Path) -> None:
    """Not only the first one."""
    (here / "json" / "b.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    assert "data.text_column=text: no such column; the file has: body (json/b.jsonl:1)" in refusal(
        name="json"
    )
    (here / "text" / "b.TXT").write_bytes("na\xefve".encode("latin-1") + b"x" * 100)
    assert "text/b.TXT is not UTF-8 text" in refusal(name="text")
    (here / "text" / "b.TXT").write_bytes(b"\0\1\2\3" * 100)
    assert "text/b.TXT is not text but binary" in refusal(name="text")
    (here / "text" / "b.TXT").write_bytes(
        b"x" * (2**16 - 1) + "é".encode()
    )  # the end of what is looked at cuts it
    check_source(loaded(name="text").data)
