"""Whole runs on models, data and file systems of other kinds than the default's."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from launching import Launcher, summary_of, the_run
from transformers import AutoConfig, AutoModelForCausalLM

from tp_trainer.assets import TOKENIZER

sys.path.append(str(Path(__file__).parent.parent))

from configs import TINY_RUN
from mirror import mirror

pytestmark = pytest.mark.matrix
NUMBERS = {**TINY_RUN["model"]["architecture"], "num_hidden_layers": 1}  # as the quick settings say
SETTINGS = ("parallelism=tp1_dp2", "train.max_steps=4", "tracker=none", "data.seq_length=32")


def model(directory: Path, **fields: object) -> Path:
    """A model with weights and the embedded tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**NUMBERS, **fields})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for path in TOKENIZER.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def test_a_model_of_a_mirror(launcher: Launcher, tmp_path: Path) -> None:
    made = model(tmp_path / "made")
    with mirror({path.name: path.read_bytes() for path in made.iterdir()}) as server:
        env = launcher.env | {
            "HF_ENDPOINT": f"http://{server.at}/mirror/hf",
            "HF_HOME": str(tmp_path / "hf"),
        }
        ended = launcher.run(*SETTINGS, "model.name=owner/model", env=env)
    assert ended.code == 0, ended
    assert [each for each in server.asked if "GET" in each and "model.safetensors" in each]


def test_tables_in_an_ascii_locale(launcher: Launcher, tmp_path: Path) -> None:
    """Odd names, a huge number in another column, nulls."""
    made = model(tmp_path / "模型")
    rows = [
        f"{2**70 if i == 7 else i},{'' if i % 50 == 3 else f'whale 鲸 {i} ' * 9}\n"
        for i in range(200)
    ]
    (tmp_path / "数据, it's.csv").write_text("id,text\n" + "".join(rows), encoding="utf-8")
    env = launcher.env | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    name = 'data.name="数据, it\'s.csv"'
    ended = launcher.run(*SETTINGS, f"model.name='{made}'", name, env=env)
    assert ended.code == 0, ended
    train = summary_of(the_run(launcher.storage))["data"]["train"]
    assert train["skipped"] == {"null": 4}
    assert train["first_skipped"] == [
        f"row {row} of {tmp_path}/数据, it's.csv" for row in (3, 53, 103)
    ]


def test_yarn_as_it_is_published(launcher: Launcher, tmp_path: Path) -> None:
    made = model(tmp_path / "made")
    config = json.loads((made / "config.json").read_text())
    del config["rope_parameters"]
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    (made / "config.json").write_text(json.dumps({**config, "rope_scaling": scaling}))
    long = (*SETTINGS[:-1], f"model.name={made}", "parallelism=tp2_dp1", "data.seq_length=512")
    for task in ("train", "verify"):
        ended = launcher.run(*long, f"task={task}", "experiment_name=a")
        assert ended.code == 0, ended


def test_a_file_system_that_syncs_no_directories(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import errno, os, stat\n"
        "real = os.fsync\n"
        "def fsync(handle):\n"
        "    number = handle if isinstance(handle, int) else handle.fileno()\n"
        "    if stat.S_ISDIR(os.fstat(number).st_mode):\n"
        "        raise OSError(errno.EINVAL, 'Invalid argument')\n"
        "    return real(handle)\n"
        "os.fsync = fsync\n"
    )
    env = launcher.env | {"PYTHONPATH": str(tmp_path / "hook")}
    ended = launcher.run(*SETTINGS, "checkpoint.interval=2", env=env)
    assert ended.code == 0 and ended.out.count("doesn't sync directories") == 1, ended
    assert sorted(path.name for path in the_run(launcher.storage).glob("step_*")) == [
        "step_00000002",
        "step_00000004",
    ]
