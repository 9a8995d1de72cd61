"""Every causal language model of the installed transformers, sorted: writes docs/families.md.

    python benchmarks/families.py            # prints the table
    python benchmarks/families.py --write    # puts it into docs/families.md

certified: held against plain transformers, 20 steps in four layouts (tests/distributed).
by rule: transformers' tensor-parallel plan, and the fields that any family honours, say all of
    it; not certified, so `task=verify` comes first.
text part: a multimodal model, of which the text model is trained.
Everything else is refused, with the sentence that a user gets.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "distributed"))

import transformers
from plain_reference import SIZES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tp_trainer.config import FAMILIES, ConfigError, load
from tp_trainer.config.towers import TEXT_TYPES, WRAPPERS
from tp_trainer.models.description import check_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
IDS = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
EXPERTS = re.compile(r"^(num_(local_|routed_)?experts|n_routed_experts|moe_\w+)$")
# dropout that a class has on, and that a config would have to switch off
OFF = {"attention_dropout": 0.0, "residual_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
Row = tuple[str, str, str]  # type, verdict, why


def survey() -> Iterator[Row]:
    """A row for each causal-LM type that the installed transformers knows, by name."""
    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        yield model_type, *verdict(model_type)


def verdict(model_type: str) -> tuple[str, str]:
    """What becomes of a type in a small config of its class's defaults, and why."""
    if model_type in FAMILIES:
        return "certified", ""
    config_class: Any = CONFIG_MAPPING[model_type]
    names = {each.name for each in fields(config_class)}
    if any(EXPERTS.match(name) and getattr(config_class, name, None) for name in names):
        return "refused", "a mixture of experts"
    if config_class.sub_configs:
        text_type = _text_type(config_class)
        if text_type in FAMILIES:
            held = "" if model_type in WRAPPERS else "; never held against the whole model"
            return "text part", f"trained and exported as {text_type}{held}"
        return "refused", f"made of several models ({', '.join(sorted(config_class.sub_configs))})"
    if not config_class.base_model_tp_plan:
        return "refused", "transformers has no tensor-parallel plan for it"
    known = names | set(config_class.attribute_map)
    small = {name: value for name, value in {**SIZES, **IDS, **OFF}.items() if name in known}
    values = {
        "model": {"architecture": {"model_type": model_type, **small}},
        "data": {"seq_length": 64},
        "parallelism": {"tp": 2, "dp": 1},
    }
    try:
        check_model(load(values))
    except ConfigError as error:
        return "refused", error.message.partition(";")[0]
    except Exception as error:  # what a class does with numbers that aren't its own
        return "refused", f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return "by rule", "not certified: run `task=verify` first"


def _text_type(config_class: Any) -> str:
    """The type that a multimodal model's text part is by itself; empty where it has none."""
    try:
        own = str(config_class().text_config.model_type)
    except Exception:  # no such part, or a class whose defaults it doesn't take itself
        return ""
    return TEXT_TYPES.get(own, (own,))[0]


def page() -> str:
    """docs/families.md."""
    rows = list(survey())
    counts = Counter(verdict for _, verdict, _ in rows)
    dense = [row for row in rows if row[2] not in ("a mixture of experts",)]
    lines = [
        "# Families",
        "",
        "Made by `python benchmarks/families.py --write`; a test says when it is stale.",
        "",
        f"transformers {transformers.__version__}, {len(rows)} types of causal language models:"
        f" {counts['certified']} certified, {counts['by rule']} by rule, {counts['text part']}"
        " multimodal ones by their text part,"
        f" {len(rows) - len(dense)} mixtures of experts, which are refused for now,"
        f" {counts['refused'] - len(rows) + len(dense)} others refused.",
        "",
        "| type | | why |",
        "|---|---|---|",
        *(f"| {name} | {verdict} | {why} |" for name, verdict, why in rows),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    text = page()
    if parser.parse_args().write:
        PAGE.write_text(text)
    else:
        sys.stdout.write(text)
