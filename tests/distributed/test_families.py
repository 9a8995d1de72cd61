"""The families' records: which config fields are honoured, and a record from outside."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from comparison import certify, compare
from plain_reference import FAMILIES as TINY
from plain_reference import SIZES, TYPES, Reference, global_batches, plain_model, settings_of
from rank_cases import run_steps
from rank_pool import RankError, RankPool
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tp_trainer.config import FAMILIES, Config, ConfigError, load
from tp_trainer.models import build, honoured
from tp_trainer.models.description import check_model
from tp_trainer.models.families import COMMON, HARMLESS, RECORDS, Family
from tp_trainer.models.split import is_gradient_summed
from tp_trainer.tasks.describe import StoredRun, stored_names

# what a config class makes other fields of
DERIVED = {
    "use_sliding_window": "sliding_window",
    "max_window_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "dim_model_base": "logits_scaling",
}
# on in the class: refused with what to type, until it is off
SWITCHED_OFF_BY_HAND = {("seed_oss", "residual_dropout")}
GIVEN = ("dtype", "use_cache")  # with each call or model, whatever the config says
# read by code that all families share: of initialisation, rope, and ties
SHARED = {"initializer_range", "max_position_embeddings", "rope_parameters", "tie_word_embeddings"}


def fields_of(model_type: str) -> dict[str, Any]:
    """The fields of a family's config class, with their defaults."""
    return {each.name: each.default for each in dataclasses.fields(CONFIG_MAPPING[model_type])}


def modelling(model_type: str) -> str:
    """The source of a family's model."""
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return inspect.getsource(sys.modules[model.__module__])


def read(name: str, source: str) -> bool:
    """Whether a model's source reads a field of its config."""
    return re.search(rf'config\.{name}\b|config, "{name}"', source) is not None


def loaded(architecture: dict[str, Any], **model: Any) -> Config:
    return load(
        {
            "model": {"architecture": architecture, **model},
            "data": {"seq_length": 64},
            "parallelism": {"tp": 1, "dp": 1},
        }
    )


def checked(architecture: dict[str, Any], **model: Any) -> None:
    check_model(loaded(architecture, **model))


def test_every_record_is_of_a_family_that_is_served() -> None:
    assert set(RECORDS) <= set(FAMILIES)
    assert all(record.model_type == model_type for model_type, record in RECORDS.items())


@pytest.mark.parametrize("model_type", TYPES)
def test_each_config_field_is_honoured_harmless_or_refused(model_type: str) -> None:
    """A release of transformers with a field that is on, or that its model reads and this doesn't
    know, shows up here."""
    family, source = RECORDS.get(model_type, Family(model_type)), modelling(model_type)
    assert not COMMON & HARMLESS and not family.honoured & (COMMON | HARMLESS)
    assert family.honoured <= set(fields_of(model_type)), "a field that the class doesn't have"
    for name, default in fields_of(model_type).items():
        if name in HARMLESS:
            assert name in GIVEN or not read(name, source), f"{name} isn't harmless"
        elif family.lets_through(name):
            used = name in SHARED or read(DERIVED.get(name, name), source)
            assert used, f"{name} is honoured, and no model reads it"
        else:
            off = name == "return_dict" or (model_type, name) in SWITCHED_OFF_BY_HAND
            assert off or not default, f"{name} is on, and not honoured"
            changed = False if default is True else 3 if isinstance(default, int) else True
            with pytest.raises(ConfigError, match=rf"model\.architecture\.{name}=.* not honoured"):
                checked({**TINY[model_type], name: changed})


@pytest.mark.parametrize(
    "family", [name for name in TINY if TINY[name]["model_type"] in TYPES and "olmo3_a" not in name]
)
def test_what_is_held_against_plain_transformers_is_let_in(family: str) -> None:
    checked(TINY[family])


RECORD = """
from tp_trainer.models.families import Family, Role

STARCODER2 = Family("starcoder2", honoured=frozenset({"norm_epsilon", "use_bias"}))
GLM = Family(
    "glm",
    roles={"layers.*.mlp.down_proj": Role.ROW},
    fused={"layers.*.mlp.gate_up_proj": ("inner", "inner")},
)
OTHER = Family("olmo")
NONE = {"model_type": "starcoder2"}
"""
STARCODER2 = {"model_type": "starcoder2", **SIZES, "norm_epsilon": 1e-3}
GLM = {"model_type": "glm", **SIZES, "head_dim": 16, "attention_bias": True, "pad_token_id": 0}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that holds records."""
    (tmp_path / "records_of_mine.py").write_text(RECORD)
    monkeypatch.syspath_prepend(tmp_path)
    return "records_of_mine"


@pytest.fixture
def uncertified() -> Iterator[None]:
    """No table knows any type."""
    with mock.patch.object(honoured, "FAMILIES", ()), mock.patch.dict(RECORDS, clear=True):
        yield


@pytest.mark.usefixtures("uncertified")
def test_a_record_from_outside_lets_its_family_in(record: str) -> None:
    says = r"model_type=starcoder2: is in no table.*: norm_epsilon, use_bias;.*model\.family"
    with pytest.raises(ConfigError, match=says):
        checked(STARCODER2)
    checked(STARCODER2, family=f"{record}:STARCODER2")
    with pytest.raises(ConfigError, match=r"residual_dropout=0.1: is not honoured in training"):
        checked({**STARCODER2, "residual_dropout": 0.1}, family=f"{record}:STARCODER2")


@pytest.mark.usefixtures("uncertified")
def test_a_type_in_no_table_runs_by_rule_and_says_so() -> None:
    found = check_model(loaded(TINY["llama"]))
    assert found is not None and "llama is not certified" in found and "task=verify" in found


def test_a_certified_type_says_nothing() -> None:
    assert check_model(loaded(TINY["llama"])) is None


def test_a_plan_that_needs_a_record(record: str, tmp_path: Path) -> None:
    """The driver refuses what the split table can't be made of."""
    (tmp_path / "empty_record.py").write_text(
        "from tp_trainer.models.families import Family\nGLM = Family('glm')\n"
    )
    checked(GLM, family=f"{record}:GLM")
    says = "model_type=glm: its tensor-parallel plan uses colwise_gather_output, rowwise_split_inp"
    with pytest.raises(ConfigError, match=says):
        checked(GLM, family="empty_record:GLM")


def test_a_parameter_that_no_role_covers(record: str, tmp_path: Path) -> None:
    """Apertus' activation has parameters, and transformers' plan says nothing of them."""
    (tmp_path / "no_roles.py").write_text(
        "from tp_trainer.models.families import Family\nAPERTUS = Family('apertus')\n"
    )
    checked(TINY["apertus"])
    says = r"model_type=apertus: no role says how model\.layers\.\*\.mlp\.act_fn\.alpha_p lies over"
    with pytest.raises(ConfigError, match=says):
        checked(TINY["apertus"], family="no_roles:APERTUS")


@pytest.mark.parametrize("field", ["output_attentions", "output_hidden_states"])
def test_what_is_harmless_changes_nothing(ranks: RankPool, field: str) -> None:
    def settings(value: bool) -> dict[str, Any]:
        return settings_of({**TINY["qwen2"], field: value}, tp=2)

    on, off = (ranks.run(2, run_steps, settings(value), 2)[0] for value in (True, False))
    assert on["losses"] == off["losses"] and on["norms"] == off["norms"]


def steps_with_record(directory: str, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """On a rank whose PYTHONPATH has the directory."""
    sys.path.insert(0, directory)
    importlib.invalidate_caches()
    try:
        return run_steps(settings, steps)
    finally:
        sys.path.remove(directory)


BARE = """
from tp_trainer.models.families import Family

BARE = Family({!r}, honoured=frozenset({!r}), layer_types={!r})
"""
TOLD = [  # whose record says more than which fields are honoured
    name
    for name in TYPES
    if name in RECORDS
    and dataclasses.replace(RECORDS[name], honoured=frozenset(), passes_documents=True)
    != Family(name)
]


@pytest.mark.families
@pytest.mark.sampled(4)
@pytest.mark.parametrize("model_type", TOLD)
def test_without_its_record_a_family_is_refused_or_wrong(
    ranks: RankPool, tmp_path: Path, model_type: str
) -> None:
    """A negative control: what the record says is needed, and the certificate sees it."""
    record = RECORDS[model_type]
    logits = {
        name
        for name in (record.logit_factor, record.logit_divisor, record.logit_softcap)
        if name is not None
    }
    (tmp_path / f"bare_{model_type}.py").write_text(
        BARE.format(model_type, sorted(record.honoured | logits), record.layer_types)
    )
    plain_model(TINY[model_type]).save_pretrained(tmp_path / "model")
    settings = settings_of(str(tmp_path / "model"), tp=2, optim={"lr": 1e-4})
    expected = Reference(settings).run(global_batches(settings, 2))
    certify(ranks.run(2, run_steps, settings, 2)[0], expected)
    settings["model"]["family"] = f"bare_{model_type}:BARE"
    with pytest.raises((RankError, AssertionError)) as failed:
        certify(ranks.run(2, steps_with_record, str(tmp_path), settings, 2)[0], expected)
    assert "can't be imported" not in str(failed.value), "nothing was tried"


def steps_summed_amiss(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """With the rule of which gradients are parts of a sum turned round."""
    other = mock.patch.object(
        build, "is_gradient_summed", lambda *args: not is_gradient_summed(*args)
    )
    with other:
        return run_steps(settings, steps)


@pytest.mark.families
@pytest.mark.sampled(8)
@pytest.mark.parametrize("model_type", TYPES)
def test_with_other_sums_a_family_is_wrong(
    ranks: RankPool, tmp_path: Path, model_type: str
) -> None:
    plain_model(TINY[model_type]).save_pretrained(tmp_path / "model")
    settings = settings_of(str(tmp_path / "model"), tp=2, optim={"lr": 1e-4})
    expected = Reference(settings).run(global_batches(settings, 2))
    with pytest.raises(AssertionError):
        certify(ranks.run(2, steps_summed_amiss, settings, 2)[0], expected)


@pytest.mark.parametrize("name", ["STARCODER2", "GLM"])
def test_a_family_from_outside_is_plain_transformers(
    ranks: RankPool, record: str, tmp_path: Path, name: str
) -> None:
    plain_model({"STARCODER2": STARCODER2, "GLM": GLM}[name]).save_pretrained(tmp_path / "model")
    settings = settings_of(str(tmp_path / "model"), tp=2)
    settings["model"]["family"] = f"{record}:{name}"
    check_model(load(settings))
    expected = Reference(settings).run(global_batches(settings, 2))
    compare(ranks.run(2, steps_with_record, str(tmp_path), settings, 2), expected)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("records_of_mine", "must be package.module:name"),
        (":STARCODER2", "must be package.module:name"),
        ("no_such_module:X", r"can't be imported \(ModuleNotFoundError: .*PYTHONPATH"),
        ("records_of_mine:MISSING", r"can't be imported \(AttributeError: .*MISSING"),
        ("records_of_mine:NONE", "is of type dict, not a tp_trainer.models.families.Family"),
        ("records_of_mine:OTHER", "is the record of olmo, and the model's model_type is starcoder"),
    ],
)
def test_a_reference_that_is_no_record(record: str, reference: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model.family={reference}: {says}") as refused:
        checked(STARCODER2, family=reference)
    assert "\n" not in str(refused.value)


def test_a_record_from_outside_names_an_exports_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from tp_trainer.models.families import Family\n"
    (tmp_path / "named.py").write_text(
        f"{text}GLM = Family('glm', stored={{'out.': 'lm_head.'}})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = StoredRun(GLM, "named:GLM", None, None, False, False, None)
    names = ["lm_head.weight", "model.norm.weight"]
    assert stored_names(run, names) == {"lm_head.weight": "out.weight"}
    with pytest.raises(ConfigError, match=r"model\.family=absent:GLM: can't be imported"):
        stored_names(dataclasses.replace(run, family="absent:GLM"), names)


def test_a_record_of_a_model_that_transformers_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = RECORD.replace("olmo", "gpt3")
    (tmp_path / "records_of_gpt3.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="model_type=gpt3: transformers knows no such model"):
        checked({**STARCODER2, "model_type": "gpt3"}, family="records_of_gpt3:OTHER")
