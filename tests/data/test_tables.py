"""One local file for the datasets library, as data.name: what load_dataset reads of it, or a
sentence that names the file or the column at fault.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from tp_trainer.config import ConfigError, Data, load
from tp_trainer.data.sources import Skipped, Source, absolute, check_source

BOM = codecs.BOM_UTF8
ARCHITECTURE = {
    "model_type": "qwen2",
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
TEXTS = [f"whale {i}" for i in range(20)]
TABLE = pa.table({"id": list(range(20)), "text": TEXTS})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield tmp_path


def put(name: str, content: object) -> str:
    """A file of that content: text, bytes, or a table in the format that its suffix says."""
    path = Path(name)
    path.parent.mkdir(exist_ok=True, parents=True)
    if isinstance(content, pa.Table) and path.suffix == ".parquet":
        parquet.write_table(content, path)
    elif isinstance(content, pa.Table):
        make = ipc.new_stream if "stream" in name else ipc.new_file
        with pa.OSFile(str(path), "wb") as file, make(file, content.schema) as writer:
            writer.write_table(content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    return name


def data(name: str, **more: Any) -> Data:
    """As it comes out of the config and the driver's checks."""
    chosen = load({"model": {"architecture": ARCHITECTURE}, "data": {"name": name, **more}}).data
    assert chosen.source == "hub"
    absolute(chosen)
    check_source(chosen)
    return chosen


def read(name: str, **more: Any) -> tuple[list[str], Skipped]:
    source, skipped = Source(data(name, **more)), Skipped()
    return [text for part in ("train", "validation") for text in source.documents(part, skipped)], (
        skipped
    )


def refusal(name: str, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(name, **more)
    assert "\n" not in str(caught.value) and "the network" not in str(caught.value)
    return str(caught.value)


ROWS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "id,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(TEXTS))
KINDS: dict[str, tuple[str, object]] = {
    "csv": ("a.csv", CSV),
    "CSV": ("A.CSV", CSV),
    "tsv": ("a.tsv", CSV.replace(",", "\t")),
    "parquet": ("a.parquet", TABLE),
    "arrow": ("a.arrow", TABLE),
    "arrow stream": ("stream.arrow", TABLE),
    "json": ("a.json", json.dumps(ROWS)),
    "json lines": ("lines.json", LINES),
    "BOM, csv": ("a.csv", BOM + b"text,id\n" + b"".join(b"%b,1\n" % t.encode() for t in TEXTS)),
    "BOM, json": ("a.json", BOM + json.dumps(ROWS).encode()),
    "BOM, json lines": ("a.json", BOM + LINES.encode()),
    "CRLF, csv": ("a.csv", CSV.replace("\n", "\r\n")),
    "CRLF, json": ("a.json", LINES.replace("\n", "\r\n")),
    "other columns twice, csv": ("a.csv", CSV.replace("id,", "id,id,").replace("\n", "\n7,")[2:-2]),
    "huge integers, csv": ("a.csv", CSV.replace("\n3,", f"\n{2**70},")),
    "huge integers, json": ("a.json", LINES.replace('"id": 3,', f'"id": {2**70},')),
    "a column of two kinds, csv": (
        "a.csv",
        CSV + "".join(f"{i},\n" for i in range(10_000)) + "x,\n",
    ),
    "odd name": ("it's [1], 数据*.csv", CSV),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_reads_as_in_load_dataset(kind: str) -> None:
    texts, _ = read(put(*KINDS[kind]))
    assert texts == TEXTS


def test_parts_splits_and_columns() -> None:
    name = put("a.parquet", TABLE.rename_columns(["id", "body"]))
    chosen = data(name, text_column="body", validation_percentage=20, split="train[:50%]")
    source = Source(chosen)
    assert list(source.documents("train", Skipped())) == TEXTS[:8]
    assert list(source.documents("validation", Skipped())) == TEXTS[8:10]
    assert source.files() == [Path(name).absolute()] and source.revision is None
    assert chosen.name == str(Path(name).absolute())


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow", "json", "huge.csv"])
def test_nulls_are_counted_and_the_first_three_named(kind: str) -> None:
    table = pa.table({"text": ["a", None, "b", None, None, "", None, "c"]})
    rows = [{"text": text} for text in table["text"].to_pylist()]
    csv = "id,text\n" + "".join(f"1,{row['text'] or ''}\n" for row in rows)
    content = {"csv": csv, "json": json.dumps(rows), "huge.csv": csv.replace("1,a", f"{2**70},a")}
    name = put(f"a.{kind}", content.get(kind, table))
    texts, skipped = read(name)
    assert texts == ["a", "b", "c"] and skipped.counts.total() == 5
    assert skipped.counts["null"] == (5 if "csv" in kind else 4)
    assert skipped.first == [f"row {row} of {Path(name).absolute()}" for row in (1, 3, 4)]


TWICE = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
FAULTS: dict[str, tuple[str, object, str]] = {
    "column": (
        "a.csv",
        "id,body\n1,x\n",
        "data.text_column=text: no such column; the file has: ",
    ),
    "column, json": (
        "a.json",
        '{"body": "x"}\n',
        "data.text_column=text: no such column; the ",
    ),
    "column twice, csv": ("a.csv", "text,text\na,b\n", "data.text_column=text: stands 2 times in "),
    "column twice, parquet": ("a.parquet", TWICE, "data.text_column=text: stands 2 times in "),
    "column twice, arrow": ("a.arrow", TWICE, "data.text_column=text: stands 2 times in "),
    "key twice, json": ("a.json", '{"text": "a", "text": "b"}\n', "specified twice"),
    "numbers": ("a.csv", "text\n1\n2\n", "data.text_column=text: holds a int in row 0 of "),
    "a number later": ("a.json", '{"text": "a"}\n{"text": 5}\n', "holds a int in row 1 of "),
    "bytes": ("a.parquet", pa.table({"text": [b"a"]}), "holds a bytes in row 0 of "),
    "more fields": ("a.csv", "id,text\n1,a\n2,b, c\n", "Expected 2 fields in line 3, saw 3"),
    "latin": ("a.csv", "text\ncaf\u00e9\n".encode("latin-1"), "'utf-8' codec can't decode"),
    "no json": ("a.json", '{"text": "a"}\n{oops\n', "JSON parse error"),
    "huge, json": ("a.json", f'[{{"id": {2**70}, "text": "a"}}]', "too big"),
    "no parquet": ("a.parquet", "PAR1", "can't be read (Parquet file size is 4 bytes"),
    "no arrow": ("a.arrow", "x", "can't be read ("),
    "empty csv": ("a.csv", "", "can't be read (No columns"),
    "empty json": ("a.json", "", "holds no rows"),
    "header alone": ("a.csv", "id,text\n", "holds no rows"),
    "no rows": ("a.parquet", TABLE.slice(0, 0), "holds no rows"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_file(fault: str) -> None:
    name, content, says = FAULTS[fault]
    said = refusal(put(name, content))
    assert says in said and name in said, said


def test_a_name_that_the_library_takes_for_something_else() -> None:
    said = refusal(put("a::b.csv", CSV))
    assert said.count("can't be read") == 1 and "a::b.csv can't be read (" in said


def test_the_file_at_fault_in_a_directory() -> None:
    for number in range(3):
        put(f"set/{number}.csv", CSV)
    put("set/1.csv", CSV.replace("\n3,", f"\n{2**70},"))
    said = refusal("set")
    assert said.startswith("data.name=") and "set/1.csv can't be read (Python int too large" in said
    put("set/1.csv", CSV + "1,2,3\n")
    assert "set/1.csv can't be read (Error tokenizing data" in refusal("set")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"split": "test"}, "data.split=test: "),
        ({"validation_split": "validation"}, "data.validation_split=validation: "),
        ({"subset": "en"}, "data.subset=en: a.csv is a file and has none; leave it null"),
        ({"revision": "main"}, "data.revision=main: a.csv is a file and has none; leave it null"),
    ],
)
def test_what_a_file_has_not(more: dict[str, str], says: str) -> None:
    assert refusal(put("a.csv", CSV), **more).startswith(says)


def test_a_file_that_is_not_there() -> None:
    for source in (None, "hub"):
        said = refusal("gone.csv", source=source)
        assert said.startswith("data.name=gone.csv: no such file or directory (seen from ")
    put("gone.csv", CSV)
    chosen = data("gone.csv")
    Path("gone.csv").unlink()
    with pytest.raises(ConfigError, match=r"no such file or directory .*that every node sees"):
        Source(chosen).hub.open("train")


def test_a_file_that_was_changed_is_read_anew() -> None:
    assert read(put("a.csv", CSV))[0] == TEXTS
    assert read(put("a.csv", CSV.replace("whale", "sea")))[0][0] == "sea 0"
