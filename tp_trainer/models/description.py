"""What a model is before it has weights: transformers' own config and class, on the meta device.

Here what a user says of a model meets what transformers knows of its family: fields that it doesn't
have, values that it doesn't take, weights that are not its own. Read by every rank, and by the
driver beside Ray's start.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tp_trainer.config import Config, ConfigError, Model, check, nearest
from tp_trainer.config.architecture import FROM_FILE, Architecture
from tp_trainer.config.quoting import assignment
from tp_trainer.config.rope import NEW, ROPE
from tp_trainer.config.towers import WRAPPERS
from tp_trainer.models.families import Family, family_of
from tp_trainer.models.files import Stored, check_quantisation, is_untied, matched, stored_tensors
from tp_trainer.models.honoured import NOT_OURS, check_fields, check_layers, is_certified
from tp_trainer.models.split import split_table
from tp_trainer.parallel import attention

TIED = "tie_word_embeddings"


def meta_model(architecture: Mapping[str, Any]) -> PreTrainedModel:
    """The transformers model of these config fields, in float32, on the meta device.

    Raises:
        ConfigError: transformers doesn't take the fields.
    """
    fields = {
        key: value
        for key, value in copy.deepcopy(dict(architecture)).items()
        if key not in NOT_OURS
    }
    try:
        config = AutoConfig.for_model(architecture["model_type"], **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=attention.NAME, dtype=torch.float32
            )
    except Exception as error:  # each release checks them with another class of error
        raise ConfigError(
            "model.architecture", None, f"transformers doesn't take these numbers: {_reason(error)}"
        ) from error
    model.float()  # a module may insist on a dtype of its own
    model.tie_weights()
    return model


def with_buffers(config: Any) -> PreTrainedModel:
    """The transformers model of a config with its buffers on the CPU, and parameters on the meta
    device.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return made


def described(model: Model, stored: Mapping[str, Stored] | None) -> PreTrainedModel:
    """The meta model that belongs to these weights, with its family's record as `tp_family`.

    A config that ties while the files hold another head is not tied, as transformers has it.

    Args:
        stored: the tensors of its files; None = random weights.
    """
    found, family = meta_model(model.architecture), family_of(model)
    if stored is not None and is_untied(stored, found, family):
        found = meta_model({**model.architecture, TIED: False})
    found.tp_family = family
    return found


def check_model(config: Config) -> str | None:
    """Whether the chosen model is one, fields, numbers and weights; for the driver, which reads but
    headers of files.

    What a model's config.json leaves to its family (key/value heads, head width, ties) is completed
    in place.

    Returns:
        what the user should know of it, if anything.

    Raises:
        ConfigError: something of it can't be had.
    """
    model, fields = config.model, config.model.architecture
    family, model_type = family_of(model), str(fields["model_type"])
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            "model.architecture.model_type", model_type, "transformers knows no such model"
        )
    _check_code(model)
    check_fields(model, CONFIG_MAPPING[model_type], family)
    _check_rope(fields.get(NEW), model)
    with _rope_warnings() as warnings:
        built = described(model, None)
    if warnings and set(ROPE) & set(model.overrides):
        raise ConfigError(
            f"model.overrides.{next(key for key in ROPE if key in model.overrides)}",
            None,
            warnings[0],
        )
    _check_rope(getattr(built.config, NEW, None), model)
    check_layers(model, family, getattr(built.config, "layer_types", None) or ())
    _check_heads(built.config)
    _complete(config, built.config)
    split_table(built, config.parallelism.tp)
    if model.weights == "pretrained":
        check_quantisation(model)
    if model.weights == "pretrained" and Path(str(model.name)).is_dir():
        stored = stored_tensors(model)
        matched(stored, described(model, stored), str(model.name))
    notices = [_text_of(model), _uncertified(model)]
    if config.cluster.device != "cpu":
        notices.append(_without_kernels(model_type, family))
    return "; ".join(filter(None, notices)) or None


def _text_of(model: Model) -> str | None:
    wrapper = model.architecture.get(FROM_FILE)
    if not isinstance(wrapper, str):
        return None
    text_type = model.architecture["model_type"]
    return (
        f"model: the text part of {model.name}, a {wrapper}, is trained and exported as"
        f" {text_type}; its other parts are left out"
        + ("" if wrapper in WRAPPERS else f"; no {wrapper} was ever held against that")
    )


def _without_kernels(model_type: str, family: Family) -> str | None:
    """transformers tells only the workers' logs."""
    absent = [package for module, package in family.kernels.items() if find_spec(module) is None]
    if not absent:
        return None
    return (
        f"model: {' and '.join(absent)} not found here: {model_type}'s recurrent layers run as"
        " transformers' plain torch code, which is slower"
    )


def _uncertified(model: Model) -> str | None:
    if is_certified(model):
        return None
    model_type = model.architecture["model_type"]
    named = assignment("model.name", model.name) if model.name else "the same model"
    return (
        f"model: {model_type} is not certified: nothing in its config goes unhonoured, but its"
        f" numbers were never held against transformers' own; run task=verify {named} first"
    )


def _complete(config: Config, real: Any) -> None:
    """Fill in what the family's class says of the numbers that the driver goes by, and check the
    layout against them.
    """
    fields = config.model.architecture
    for each in dataclasses.fields(Architecture):
        value = getattr(real, each.name, None)
        if fields.get(each.name) is None and isinstance(value, (bool, int)):
            fields[each.name] = value
    check(config)


def _check_heads(real: Any) -> None:
    """Raises ConfigError for heads that don't divide the width, or have an odd one."""
    heads, hidden, width = (
        real.num_attention_heads,
        real.hidden_size,
        getattr(real, "head_dim", None),
    )
    if width is None and hidden % heads:
        raise ConfigError(
            "model.architecture.num_attention_heads", heads, f"must divide hidden_size={hidden}"
        )
    if (width or hidden // heads) % 2:
        raise ConfigError(
            "model.architecture.num_attention_heads",
            heads,
            f"makes heads of width {width or hidden // heads}; rotary embeddings need an even one",
        )


def _check_code(model: Model) -> None:
    """Code that comes with a model is run for its tokenizer, not for the model itself."""
    classes = model.architecture.get("auto_map")
    if (
        model.trust_remote_code
        and isinstance(classes, Mapping)
        and {"AutoConfig", "AutoModelForCausalLM"} & set(classes)
    ):
        raise ConfigError(
            "model.trust_remote_code",
            True,
            f"{model.name} comes with a model class of its own, which can't be split over tp; to"
            f" train it as transformers' {model.architecture['model_type']}:"
            " model.overrides.auto_map=null",
        )


def _check_rope(rope: Mapping[str, Any] | None, model: Model) -> None:
    """Raises ConfigError for a kind of rope, or a value of it, that transformers doesn't know and
    would pass over.
    """
    rope = rope or {}
    layers = [each for each in rope.values() if isinstance(each, Mapping)] or [rope]
    for each in layers:
        kind = each.get("rope_type", "default")
        if kind not in ROPE_INIT_FUNCTIONS and kind != "default":
            allowed = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise ConfigError(
                f"model.architecture.{NEW}.rope_type", kind, f"must be one of {allowed}"
            )
        unknown = sorted(
            set(each)
            - set(RopeParameters.__annotations__)
            - {"type", "truncate", "mscale", "mscale_all_dim"}
        )
        if unknown and set(ROPE) & set(model.overrides):
            near = nearest(unknown[0], sorted(RopeParameters.__annotations__))
            hint = f"; did you mean {near}?" if near else ""
            raise ConfigError(
                f"model.overrides.{NEW}.{unknown[0]}", None, f"no such field of rope{hint}"
            )


@contextmanager
def _rope_warnings() -> Iterator[list[str]]:
    """What transformers only warns of while it takes rope parameters (values that do nothing, or
    make no sense).
    """
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(" ".join(record.getMessage().split()))

    logger, keep = logging.getLogger("transformers.modeling_rope_utils"), Keep(logging.WARNING)
    logger.addHandler(keep)
    try:
        yield found
    finally:
        logger.removeHandler(keep)


def _reason(error: Exception) -> str:
    """The sentence of an error that says what is wrong, without the class that wraps it."""
    if isinstance(error, KeyError) and " " not in str(error.args[0]):
        return f"{error.args[0]!r} is none that it knows"
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(
        r"^.*?validat\w+ '\w+': \w+Error: |^Validation error for field '\w+': \w+Error: ", "", text
    )
