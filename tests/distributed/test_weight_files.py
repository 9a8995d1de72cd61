"""Directories of weights as one meets them: what is trained is what plain from_pretrained has, or
it is refused.

One step at a rate of nothing at tp 2, exported in float32: logits are those of plain transformers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_reference import plain_model, settings_of
from rank_cases import trainer
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tp_trainer.checkpoint.saving import Checkpoints
from tp_trainer.checkpoint.state import RunState
from tp_trainer.config import Cluster, ConfigError, load, to_yaml
from tp_trainer.models.description import check_model
from tp_trainer.tasks import export

FIELDS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
Tensors = dict[str, torch.Tensor]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def directory_of(path: Path, **fields: Any) -> Path:
    plain_model({**FIELDS, **fields}, seed=1).save_pretrained(path)
    return path


def rewrite(path: Path, change: Callable[[Tensors], Tensors]) -> Path:
    save_file(
        change(load_file(path / "model.safetensors")),
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path


def configure(path: Path, **fields: Any) -> Path:
    """Fields put into config.json; None takes one out."""
    content = {**json.loads((path / "config.json").read_text()), **fields}
    (path / "config.json").write_text(
        json.dumps({key: value for key, value in content.items() if value is not None})
    )
    return path


def split(path: Path) -> Path:
    """The weights in two shards with an index."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names, weight_map = list(tensors), dict[str, str]()
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return path


def other_weights(path: Path, file: str) -> Path:
    """A file beside the model's own, of other values under the same names, some of its own."""
    tensors = load_file(next(path.glob("model*.safetensors")))
    save_file(
        {**{name: tensor + 1 for name, tensor in tensors.items()}, "another": torch.ones(2)},
        path / file,
    )
    return path


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def stale_index(path: Path) -> Path:
    other_weights(path, "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(
        load_file(path / "model.safetensors"), "model-00001-of-00001.safetensors"
    )
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def named_by_the_config(path: Path) -> Path:
    (path / "model.safetensors").rename(path / "own.safetensors")
    tensors = {name: tensor + 1 for name, tensor in load_file(path / "own.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return configure(path, transformers_weights="own.safetensors")


def another_head(tensors: Tensors) -> Tensors:
    return {**tensors, HEAD: tensors[EMBEDDING].flip(0).contiguous()}


def with_code(path: Path) -> Path:
    (path / "modeling_own.py").write_text("from .helper_own import X\n")
    (path / "helper_own.py").write_text("X = 1\n")
    return configure(path, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})


TIED = {"tie_word_embeddings": True}
# fields, what is done to the directory, tied in the end
GOOD: dict[str, tuple[dict[str, Any], Callable[[Path], Path], bool]] = {
    "plain": ({}, lambda path: path, False),
    "consolidated_beside": (
        {},
        lambda path: other_weights(path, "consolidated.safetensors"),
        False,
    ),
    "variant_beside": ({}, lambda path: other_weights(path, "model.fp16.safetensors"), False),
    "shards_and_a_stray_one": (
        {},
        lambda path: other_weights(split(path), "model-00003-of-00003.safetensors"),
        False,
    ),
    "single_before_an_index": ({}, stale_index, False),
    "named_by_the_config": ({}, named_by_the_config, False),
    "no_prefix": ({}, lambda path: rewrite(path, without_prefix), False),
    "no_prefix_tied_in_shards": (TIED, lambda path: split(rewrite(path, without_prefix)), True),
    "rotary_buffers": (
        {},
        lambda path: rewrite(
            path,
            lambda each: {**each, "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        ),
        False,
    ),
    "half_precision": (
        {},
        lambda path: rewrite(path, lambda each: {name: t.bfloat16() for name, t in each.items()}),
        False,
    ),
    "tied": (TIED, lambda path: path, True),
    "tied_with_another_head": (TIED, lambda path: rewrite(path, another_head), False),
    "tied_with_another_head_no_prefix": (
        TIED,
        lambda path: rewrite(path, lambda each: without_prefix(another_head(each))),
        False,
    ),
    "tied_with_the_same_head": (
        TIED,
        lambda path: rewrite(path, lambda each: {**each, HEAD: each[EMBEDDING].clone()}),
        True,
    ),
    "tied_head_alone": (
        TIED,
        lambda path: rewrite(
            path,
            lambda each: {
                HEAD if name == EMBEDDING else name: tensor for name, tensor in each.items()
            },
        ),
        True,
    ),
    "untied_with_the_same_head": (
        {},
        lambda path: rewrite(path, lambda each: {**each, HEAD: each[EMBEDDING].clone()}),
        False,
    ),
    "old_rope": (
        {},
        lambda path: configure(
            path,
            rope_parameters=None,
            rope_theta=500.0,
            rope_scaling={"type": "linear", "factor": 2.0},
        ),
        False,
    ),
    "both_ropes": ({}, lambda path: configure(path, rope_theta=7.0), False),
    "code_beside": ({}, with_code, False),
    "sampling_in_config_json": (
        {},
        lambda path: configure(path, temperature=0.6, do_sample=True),
        False,
    ),
}


def one_step_and_save(settings: dict[str, Any], run_dir: str) -> str:
    made = trainer(settings)
    for group in made.optimizer.param_groups:
        group["lr"] = 0.0
    made.step()
    state = RunState(1, epoch=0, offset=8, tokens=512, global_batch_size=8)
    Checkpoints(run_dir, 2, made.model.module, made.optimizer, made.mesh.device).save(state)
    return made.model.description


def exported(
    ranks: RankPool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **model: Any
) -> tuple[str, Path]:
    """What the run says of the model, and its export."""

    def run_jobs(
        cluster: Cluster, function: Callable[[Any], Any], jobs: Sequence[Any], memory: Sequence[int]
    ) -> list[Any]:
        return [function(job) for job in jobs]

    monkeypatch.setattr(export, "run_jobs", run_jobs)
    settings = settings_of(str(source), 2, 1, optim={"weight_decay": 0.0})
    settings["model"] |= model
    config = load(settings)
    check_model(config)
    run = tmp_path / "run"
    says = ranks.run(2, one_step_and_save, settings, str(run))[0]
    (run / "config.yaml").write_text(to_yaml(config))
    keys = {
        "checkpoint": {"path": f"{run}/step_00000001"},
        "export": {"output": str(tmp_path / "out"), "dtype": "float32"},
    }
    export.run(load({**settings_of(FIELDS, **keys), "task": "export"}))
    return says, tmp_path / "out"


def logits(directory: Path, vocabulary: int = FIELDS["vocab_size"], **fields: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", **fields
    ).eval()
    ids = torch.randint(0, vocabulary, (2, 60), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def assert_close(mine: torch.Tensor, expected: torch.Tensor) -> None:
    assert (mine - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", GOOD)
def test_what_is_trained_is_what_from_pretrained_has(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    fields, change, tied = GOOD[kind]
    source = change(directory_of(tmp_path / "model", **fields))
    says, out = exported(ranks, source, tmp_path, monkeypatch)
    assert_close(logits(out), logits(source))
    assert ("head tied" in says) is tied
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    written = {path.name for path in out.iterdir()}
    code = {"modeling_own.py", "helper_own.py"} if kind == "code_beside" else set()
    assert written == {"config.json", "generation_config.json", "model.safetensors", *code}
    content = json.loads((out / "config.json").read_text())
    assert ("auto_map" in content) is bool(code) and not {
        "transformers_weights",
        "quantization_config",
    } & set(content)
    if kind == "sampling_in_config_json":
        (source / "generation_config.json").unlink()
        assert json.loads((out / "generation_config.json").read_text()).get("temperature") in (
            None,
            0.6,
        )


def test_sampling_that_only_config_json_has(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = configure(directory_of(tmp_path / "model"), temperature=0.6, top_p=0.9, do_sample=True)
    (source / "generation_config.json").unlink()
    _, out = exported(ranks, source, tmp_path, monkeypatch)
    mine, plain = (
        AutoModelForCausalLM.from_pretrained(each).generation_config for each in (out, source)
    )
    assert (
        (mine.temperature, mine.top_p, mine.do_sample)
        == (0.6, 0.9, True)
        == (plain.temperature, plain.top_p, plain.do_sample)
    )


def test_code_that_is_not_there_is_not_named(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = configure(
        directory_of(tmp_path / "model"), auto_map={"AutoModelForCausalLM": "modeling_gone.Own"}
    )
    _, out = exported(ranks, source, tmp_path, monkeypatch)
    assert "auto_map" not in json.loads((out / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("base", ["old", "new", "export"])
def test_rope_put_over_a_directory(
    ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str
) -> None:
    """The weights with another rope: as plain transformers has them with the old fields written
    into config.json.
    """
    source = directory_of(tmp_path / "model")
    old = {
        "rope_parameters": None,
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    }
    expected = logits(configure(Path(shutil.copytree(source, tmp_path / "expected")), **old))
    assert (expected - logits(source)).abs().max() > 1e-2 * expected.abs().max(), (
        "it makes a difference"
    )
    if base == "export":
        source = exported(ranks, source, tmp_path / "first", monkeypatch)[1]
    elif base == "old":
        configure(source, rope_parameters=None, rope_theta=9000.0)
    overrides = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    _, out = exported(ranks, source, tmp_path, monkeypatch, overrides=overrides)
    assert_close(logits(out), expected)


# --------------------------------------------------------------------------------------------------


def absent_shard(path: Path) -> Path:
    (split(path) / "model-00002-of-00002.safetensors").unlink()
    return path


def only(path: Path, file: str, content: bytes = b"x") -> Path:
    (path / "model.safetensors").unlink()
    (path / file).write_bytes(content)
    return path


def written(path: Path, file: str, content: bytes) -> Path:
    (path / file).write_bytes(content)
    return path


def dangling(path: Path) -> Path:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(path / "gone")
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "absent shard": (
        absent_shard,
        "model-00002-of-00002.safetensors is not there, one of 2 shards",
    ),
    "index of nothing": (
        lambda path: only(path, "model.safetensors.index.json", b"{}"),
        "is no index of shards",
    ),
    "index out of the directory": (
        lambda path: only(
            path, "model.safetensors.index.json", b'{"weight_map": {"a": "../x/model.safetensors"}}'
        ),
        "outside of its directory",
    ),
    "missing": (
        lambda path: rewrite(
            path, lambda each: {k: v for k, v in each.items() if "1.mlp.up" not in k}
        ),
        "missing: model.layers.1.mlp.up_proj.weight",
    ),
    "unexpected": (
        lambda path: rewrite(
            path, lambda each: {**each, "model.layers.7.mlp.up_proj.weight": torch.ones(2)}
        ),
        "unexpected: model.layers.7.mlp.up_proj.weight",
    ),
    "twice": (
        lambda path: rewrite(path, lambda each: {**each, "norm.weight": torch.ones(32)}),
        "are both the model's model.norm.weight",
    ),
    "shape": (
        lambda path: rewrite(path, lambda each: {**each, "model.norm.weight": torch.ones(33)}),
        r"model.norm.weight has shape \[33\], the model's is \[32\]",
    ),
    "a missing head": (
        lambda path: rewrite(path, lambda each: {k: v for k, v in each.items() if k != HEAD}),
        "missing: lm_head.weight.*tie_word_embeddings=true",
    ),
    "integers": (
        lambda path: rewrite(
            path, lambda each: {**each, "model.norm.weight": torch.ones(32, dtype=torch.int8)}
        ),
        "model.norm.weight is of dtype I8",
    ),
    "quantised": (
        lambda path: configure(path, quantization_config={"quant_method": "fp8"}),
        "quantised weights.*fp8",
    ),
    "pickled": (
        lambda path: only(path, "pytorch_model.bin"),
        "pickled weights.*convert them once: python -c .*save_pretrained",
    ),
    "gguf": (lambda path: only(path, "tiny.gguf"), "GGUF weights .tiny.gguf.*gguf_file=f"),
    "another variant alone": (
        lambda path: only(path, "model.fp16.safetensors"),
        "from_pretrained doesn't read model.fp16.safetensors",
    ),
    "consolidated alone": (
        lambda path: only(path, "consolidated.safetensors"),
        "has no model.safetensors",
    ),
    "lfs pointer": (
        lambda path: only(
            path, "model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"
        ),
        "git lfs pull",
    ),
    "cut off": (
        lambda path: written(
            path, "model.safetensors", (path / "model.safetensors").read_bytes()[:-9]
        ),
        "is damaged",
    ),
    "dangling link": (dangling, "is a link to .*gone, which is not there"),
    "an adapter": (lambda path: written(path, "adapter_config.json", b"{}"), "PEFT adapter"),
    "named file absent": (
        lambda path: configure(path, transformers_weights="own.safetensors"),
        "names transformers_weights=own.safetensors",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_refused_by_name(tmp_path: Path, kind: str) -> None:
    change, says = BAD[kind]
    source = change(directory_of(tmp_path / "model"))
    with pytest.raises(ConfigError, match=says) as refused:
        check_model(load(settings_of(str(source), 2, 1)))
    assert refused.value.key == "model.name" and "\n" not in str(refused.value)
