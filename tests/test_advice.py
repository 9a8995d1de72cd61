"""What an error says to type works when it is pasted: the shell and Hydra give the value back."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from configs import TINY_RUN
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tp_trainer.checkpoint.state import RunState
from tp_trainer.checkpoint.store import Store, named
from tp_trainer.cli import main
from tp_trainer.config import ConfigError, Data, Model, load
from tp_trainer.config.architecture import no_safetensors
from tp_trainer.config.quoting import assignment, hydra_text, pasted
from tp_trainer.config.source import source_of
from tp_trainer.data.tokenizer import choose_tokenizer

ODD = (
    *("plain", "it's", "a,b", "my run", "a  b", "a=b", "$HOME", "${oc.env:HOME}", "[a]", "{a: 1}"),
    *(
        'say "so"',
        "back\\slash",
        "end\\",
        "模型",
        "(1)",
        "a;b",
        "`a`",
        "1.10",
        "null",
        "True",
        "1e3",
    ),
    *("~x", "#a", "a*", "-a", "a&b", "!a", "a\tb", "nan"),
)


def read(advice: str) -> dict[str, object]:
    """The keys and values of what stands first in a line to be pasted."""
    words = [word for word in shlex.split(advice) if "=" in word][:1]
    found = {}
    for each in OverridesParser.create().parse_overrides(words):
        assert not each.is_sweep_override(), each.input_line
        found[each.key_or_group] = OmegaConf.create({"value": each.value()}).value
    return found


@pytest.mark.parametrize("value", ODD)
def test_any_text_comes_back(value: str) -> None:
    assert read(assignment("data.name", value)) == {"data.name": value}


def test_random_text_comes_back() -> None:
    letters, chosen = "ab1.'\"\\${}[](),:= #~-/!*\t`模", random.Random(1)
    for _ in range(3000):
        value = "".join(chosen.choice(letters) for _ in range(chosen.randint(1, 9)))
        assert read(assignment("a", value)) == {"a": value}, value


def test_plain_text_is_typed_as_it_stands() -> None:
    assert assignment("data.name", "/runs/a-b_1.jsonl") == "data.name=/runs/a-b_1.jsonl"
    assert pasted("checkpoint.resume", "s3://runs/a/step_00000001") == "s3://runs/a/step_00000001"
    assert assignment("data.name", "a/**/*.txt") == "data.name='a/**/*.txt'"
    assert hydra_text("my run") == '"my run"'


# ------------------------------------------------------------------------- the sentences themselves

NAMES = ("it's", "a,b", "my run", "a=b", "$HOME", "模型", "x{y}")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["it's", "a,b", "a=b", "模型", "a;b", '"', "(1)", "it's  two"])
def test_an_override_that_is_none(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As the shell hands it over."""
    said = refused(capsys, f"data.name=/data/{name}.jsonl")
    assert read(said.rstrip().rpartition(": ")[2]) == {"data.name": f"/data/{name}.jsonl"}


@pytest.mark.parametrize("name", ["[a]", "{a}", "{a: b}", "[a, b]"])
def test_a_name_in_brackets(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, f"data.name={name}")
    assert read("'" + said.rstrip().rpartition(": '")[2]) == {"data.name": name}


def test_quotes_that_the_shell_has_left_are_not_doubled(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "data.name='it's.jsonl'")
    assert read(said.rstrip().rpartition(": ")[2]) == {"data.name": "it's.jsonl"}


def test_numbers_with_a_comma_are_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert "quotes" not in refused(capsys, "optim.lr=0.1,1e-3")


@pytest.mark.parametrize("name", NAMES)
def test_files_further_down(name: str, tmp_path: Path) -> None:
    (tmp_path / name / "sub").mkdir(parents=True)
    (tmp_path / name / "sub" / "a.jsonl").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        source_of(str(tmp_path / name))
    advice = str(caught.value).rpartition("are read with ")[2]
    assert read(advice) == {"data.name": f"{tmp_path}/{name}/**/*.jsonl"}


@pytest.mark.parametrize("name", NAMES)
def test_the_directory_of_a_tokenizers_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "tokenizer.json").write_text("{}")
    data = Data(tokenizer=str(tmp_path / name / "tokenizer.json"))
    with pytest.raises(ConfigError) as caught:
        choose_tokenizer(data, Model(), 5000)
    advice = str(caught.value).rpartition("give its directory: ")[2]
    assert read(advice) == {"data.tokenizer": str(tmp_path / name)}


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_the_run(name: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path / name))
    path = store.commit(store.begin(5), RunState(5, 0, 40, 500, 8), b"{}", {})
    for typed, before in ((tmp_path / name, "e.g. "), (tmp_path / name / "step_9", "there is ")):
        with pytest.raises(ConfigError) as caught:
            named("checkpoint.resume", str(typed))
        advice = str(caught.value).rpartition(before)[2]
        assert read(advice) == {"checkpoint.resume": path}


@pytest.mark.parametrize("name", NAMES)
def test_the_python_that_converts_weights(name: str, tmp_path: Path) -> None:
    said = no_safetensors(tmp_path / name, [tmp_path / name / "pytorch_model.bin"])
    code, _, then = said.partition("python -c ")[2].partition(", then give ")
    (source,) = shlex.split(code)
    compile(source, "advice", "exec")
    assert repr(str(tmp_path / name)) in source
    assert read(then) == {"model.name": f"{name}-safetensors"}


@pytest.mark.parametrize("name", NAMES)
def test_the_directory_of_a_config(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.yaml").write_text("seed: 1\n")
    said = refused(capsys, "--config-path", str(tmp_path / name / "config.yaml"))
    assert shlex.split(said.rpartition("give its directory: ")[2])[1] == str(tmp_path / name)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_a_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(TINY_RUN))
    with pytest.raises(ConfigError) as caught:
        load({"model": {"name": str(tmp_path / name / "config.json")}})
    advice = str(caught.value).rpartition("give its directory: ")[2]
    assert read(advice) == {"model.name": str(tmp_path / name)}


@pytest.mark.parametrize("name", ["it's", "a, b", "模型"])
def test_a_sweep_into_an_odd_directory(name: str, tmp_path: Path) -> None:
    """The command line quotes for Hydra too: the sweep's own directory."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, str(root / "launch.py"), "-m", "seed=1,2", "dry_run=true"]
    command.append(f"hydra.sweep.dir={hydra_text(name)}")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / name).iterdir())[:2] == ["0", "1"]


# ----------------------------------------------------------------------------- an experiment's file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim:\n  lr: 1e-3\n", "says no package"),
        ("", "says no package"),
        ("seed: 3\n", "says no package"),
        ("# lr\n# @package _global_\noptim:\n  lr: 1e-3\n", "says no package"),
        ("defaults:\n  - override /optim: adamw\nseed: 3\n", "says no package"),
        ("# @package global\nseed: 3\n", "says global"),
        ("# @package experiment\nseed: 3\n", "says no package"),
    ],
)
@pytest.mark.parametrize("chosen", ["mine", "[mine]", "sub/mine"])
def test_an_experiment_without_its_first_line(
    text: str, said: str, chosen: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = chosen.strip("[]")
    path = tmp_path / "experiment" / f"{name}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert refused(capsys, "--config-dir", str(tmp_path), f"experiment={chosen}") == (
        f"error: experiment={name}: experiment/{name}.yaml {said}; "
        "its first line must be: # @package _global_\n"
    )


def test_an_experiment_with_a_mistake_of_another_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nopim:\n  lr: 1\n")
    said = refused(capsys, "--config-dir", str(tmp_path), "experiment=mine")
    assert said.startswith("error: opim: unknown group; did you mean optim?")
