"""Documents of every source, what is held out, and the sentence for each mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tp_trainer.config import ConfigError, Data
from tp_trainer.data.sources import absolute, check_source, documents


def jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text(
        "".join(json.dumps({"id": i, column: text}) + "\n" for i, text in enumerate(texts))
    )
    return path


def both(data: Data) -> tuple[list[str], list[str]]:
    return list(documents(data, "train")), list(documents(data, "validation"))


def message(data: Data) -> str:
    with pytest.raises(ConfigError) as caught:
        check_source(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------


def test_jsonl_holds_out_the_end(tmp_path) -> None:
    texts = [f"document {i}" for i in range(40)]
    data = Data(
        source="jsonl", name=str(jsonl(tmp_path / "a.jsonl", texts)), validation_percentage=10
    )
    assert both(data) == (texts[:36], texts[36:])


@pytest.mark.parametrize(
    ("percentage", "kept"), [(100, 36), (50, 18), (25, 9), (30, 10), (0.01, 1)]
)
def test_percentage_is_of_the_training_documents_only(
    tmp_path, percentage: float, kept: int
) -> None:
    texts = [f"document {i}" for i in range(40)]
    name = str(jsonl(tmp_path / "a.jsonl", texts))
    data = Data(source="jsonl", name=name, validation_percentage=10, percentage=percentage)
    assert both(data) == (texts[:kept], texts[36:])


def test_percentage_of_the_embedded_text() -> None:
    whole, validation = both(Data(source="embedded"))
    some, same = both(Data(source="embedded", percentage=10))
    assert some == whole[: len(whole) // 10] and same == validation
    assert both(Data(source="embedded", percentage=0.001))[0] == whole[:1]


def test_two_documents_are_one_for_each_part(tmp_path) -> None:
    data = Data(source="jsonl", name=str(jsonl(tmp_path / "a.jsonl", ["one", "two"])))
    assert both(data) == (["one"], ["two"])


@pytest.mark.parametrize("separator", ["\n\n", "\n", " ", ""])
def test_a_single_document_is_cut_by_position(tmp_path, separator: str) -> None:
    text = separator.join(f"w{i:04d}" for i in range(1000))
    (tmp_path / "only.txt").write_text(text)
    (training,), (validation,) = both(
        Data(source="text", name=str(tmp_path / "only.txt"), validation_percentage=20)
    )
    assert training + validation == text
    assert abs(len(training) / len(text) - 0.8) < 0.01
    assert training.endswith(separator)
    assert validation.startswith("w") or not separator


def test_a_single_jsonl_document_is_cut_by_position_too(tmp_path) -> None:
    data = Data(
        source="jsonl",
        name=str(jsonl(tmp_path / "a.jsonl", ["one\n\ntwo\n\nthree\n\nfour"])),
        validation_percentage=25,
    )
    assert both(data) == (["one\n\ntwo\n\nthree\n\n"], ["four"])


# --------------------------------------------------------------------------------------------------


def test_directory_glob_and_file(tmp_path) -> None:
    jsonl(tmp_path / "b.jsonl", ["b0", "b1"])
    jsonl(tmp_path / "a.jsonl", ["a0", "a1"])
    jsonl(tmp_path / "other.json", ["no"])
    (tmp_path / "sub").mkdir()
    jsonl(tmp_path / "sub" / "c.jsonl", ["c0", "c1"])

    def everything(name: str) -> list[str]:
        training, validation = both(Data(source="jsonl", name=f"{tmp_path}/{name}"))
        return training + validation

    assert everything("") == ["a0", "a1", "b0", "b1"]
    assert everything("b*") == ["b0", "b1"]
    assert everything("**/*.jsonl") == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert everything("sub/c.jsonl") == ["c0", "c1"]


def test_text_is_one_document_a_file(tmp_path) -> None:
    for name, text in [
        ("b.txt", "bee\n\nbee"),
        ("a.txt", "\ufeffay"),
        ("c.txt", "  \n"),
        ("d.txt", "dee"),
        ("x.md", "no"),
    ]:
        (tmp_path / name).write_text(text, encoding="utf-8")
    # blank c is left out
    assert both(Data(source="text", name=str(tmp_path))) == (["ay", "bee\n\nbee"], ["dee"])


def test_column_blank_lines_and_nulls(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"body": "one"}\n\n{"body": null}\n{"body": ""}\n{"body": "two", "text": "no"}\n{"body":'
        ' "three"}\n'
    )
    assert both(Data(source="jsonl", name=str(tmp_path), text_column="body")) == (
        ["one", "two"],
        ["three"],
    )


def test_absolute(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tok").mkdir()
    data = Data(source="jsonl", name="in/*.jsonl", tokenizer="tok", cache_dir="cache")
    absolute(data)
    assert (data.name, data.tokenizer, data.cache_dir) == (
        f"{tmp_path}/in/*.jsonl",
        f"{tmp_path}/tok",
        f"{tmp_path}/cache",
    )
    hub = Data(source="hub", name="owner/data", tokenizer="owner/model")
    absolute(hub)
    assert (hub.name, hub.tokenizer, hub.cache_dir) == ("owner/data", "owner/model", None)


# --------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> str:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "train.jsonl", [f"train {i}" for i in range(20)])
    jsonl(tmp_path / "set" / "validation.jsonl", ["validation 0", "validation 1"])
    return str(tmp_path / "set")


def test_hub_dataset_from_a_directory(dataset: str) -> None:
    training = [f"train {i}" for i in range(20)]
    assert both(Data(source="hub", name=dataset)) == (training[:19], training[19:])
    with_own = Data(source="hub", name=dataset, validation_split="validation", percentage=50)
    assert both(with_own) == (training[:10], ["validation 0", "validation 1"])
    assert both(
        Data(source="hub", name=dataset, split="train[:50%]", validation_percentage=20)
    ) == (training[:8], training[8:10])


@pytest.mark.parametrize(
    ("wrong", "part", "expected"),
    [
        (
            {"text_column": "body"},
            "train",
            "data.text_column=body: no such column; the dataset has: id, text",
        ),
        (
            {"text_column": "id"},
            "train",
            "data.text_column=id: holds a int in the dataset; give a column of text",
        ),
        ({"split": "trian"}, "train", "data.split=trian: "),
        ({"validation_split": "test"}, "validation", "data.validation_split=test: "),
        ({"subset": "en"}, "train", "data.subset=en: "),
    ],
)
def test_hub_mistakes(dataset: str, wrong: dict, part, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        list(documents(Data(source="hub", name=dataset, **wrong), part))
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_unreachable_hub_is_one_line(monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"^data\.name=owner/no-such-set: can't be loaded \(.*; check the id"
    ) as caught:
        list(documents(Data(source="hub", name="owner/no-such-set"), "train"))
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------


def test_check_source_lets_good_ones_through(tmp_path) -> None:
    jsonl(tmp_path / "a.jsonl", ["one"])
    (tmp_path / "a.txt").write_text("one")
    for data in (
        Data(source="embedded"),
        Data(source="random"),
        Data(source="hub", name="owner/data"),
        Data(source="hub", name=str(tmp_path)),
        Data(source="jsonl", name=str(tmp_path)),
        Data(source="text", name=f"{tmp_path}/*.txt"),
    ):
        check_source(data)


def test_missing_files(tmp_path) -> None:
    gone = f"{tmp_path}/gone.jsonl"
    assert message(Data(source="jsonl", name=gone)).startswith(
        f"data.name={gone}: no such file or directory"
    )
    assert message(Data(source="jsonl", name=f"{tmp_path}/*.jsonl")).startswith(
        f"data.name={tmp_path}/*.jsonl: no file matches this glob"
    )
    assert message(Data(source="text", name=str(tmp_path))).startswith(
        f"data.name={tmp_path}: this directory has no *.txt file"
    )
    assert (
        message(Data(source="hub", name="./gone"))
        == "data.name=./gone: no such directory, and not a hub id (owner/dataset)"
    )


def test_files_without_text(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "a.txt").write_text("")
    assert "holds no lines" in message(Data(source="jsonl", name=str(tmp_path)))
    assert "holds no text" in message(Data(source="text", name=str(tmp_path)))


def test_column_that_is_not_there(tmp_path) -> None:
    name = str(jsonl(tmp_path / "a.jsonl", ["one"], column="body"))
    expected = f"data.text_column=text: no such column; the file has: id, body ({name}:1)"
    assert message(Data(source="jsonl", name=name)) == expected


@pytest.mark.parametrize(
    ("line", "expected"), [("{'text': 1}", "is not JSON ("), ('["text"]', "is not a JSON object")]
)
def test_first_line_that_is_not_json(tmp_path, line: str, expected: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n" + line)
    found = message(Data(source="jsonl", name=str(tmp_path)))
    assert found.startswith(f"data.name={tmp_path}: {tmp_path}/a.jsonl:2 {expected}")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"oops\n", "3 is not JSON ("),
        (b'{"id": 1}\n', "no such column; the file has: id"),
        (b'{"text": 7}\n', "holds a int in "),
    ],
)
def test_later_lines_are_named_when_read(tmp_path, line: bytes, expected: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "one"}\n{"text": "two"}\n' + line + b'{"text": "four"}\n'
    )
    data = Data(source="jsonl", name=str(tmp_path))
    check_source(data)
    with pytest.raises(ConfigError) as caught:
        list(documents(data, "train"))
    assert expected in str(caught.value) and "a.jsonl:3" in str(caught.value)


@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_text_that_is_not_utf8(tmp_path, source: str) -> None:
    path = tmp_path / "latin"
    path.write_bytes("{'na\xefve': 1}".encode("latin-1"))
    with pytest.raises(ConfigError, match="latin is not UTF-8 text"):
        list(documents(Data(source=source, name=str(path)), "train"))


def test_the_driver_imports_nothing_heavy(tmp_path) -> None:
    name = jsonl(tmp_path / "a.jsonl", ["one"])
    script = f"""
import sys
from tp_trainer.config import Data, Model
from tp_trainer.data.sources import absolute, check_source
from tp_trainer.data.tokenizer import choose_tokenizer
data = Data(source="jsonl", name={str(name)!r})
absolute(data), check_source(data), choose_tokenizer(data, Model(), 4096)
heavy = ("torch", "ray", "datasets", "transformers", "tokenizers")
print([name for name in heavy if name in sys.modules])
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )
