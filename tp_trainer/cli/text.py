"""What was written for a key of text arrives as it was written.

Hydra's grammar and YAML read 2026_11_26 as a number and true as a boolean; a key of text then takes
the number's text, which is another. On the command line the text is known and kept. In a sweep and
in a file it is lost, and where it differs from what would arrive, it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf._utils import get_yaml_loader

from tp_trainer.cli.arguments import conf_dir
from tp_trainer.config import ConfigError, text_keys

ENVIRONMENT = "cluster.env"
PARAMS = "hydra.sweeper.params."
PARSER = OverridesParser.create()


def keep_text(overrides: Sequence[str]) -> list[str]:
    """The overrides, with the values of text keys quoted where Hydra would read something else.

    Raises:
        ConfigError: keys and values of text in braces that would arrive as something else.
    """
    return [_kept(override) for override in overrides]


def _kept(override: str) -> str:
    try:
        parsed = PARSER.parse_override(override)
    except HydraException:
        return override  # composition says what is wrong with it
    if parsed.is_delete() or parsed.is_sweep_override() or not _is_text(parsed.key_or_group):
        return override
    name, _, text = override.partition("=")
    value = parsed.value()
    if isinstance(value, (dict, list)):
        _check_within(parsed.key_or_group, value, text)
    if isinstance(value, (bool, int, float)):
        return f"{name}='{text.strip()}'"
    return override


def _check_within(key: str, value: dict[Any, Any] | list[Any], text: str) -> None:
    """Of a list's or of braces' values, their text is found by what stands before and after."""
    pairs = value.items() if isinstance(value, dict) else ((None, each) for each in value)
    for name, each in pairs:
        before = r"[\[,]" if name is None else rf"[{{,]\s*['\"]?{re.escape(str(name))}['\"]?\s*:"
        if isinstance(each, (bool, int, float)):
            found = re.findall(rf"{before}\s*([^,\]}}]+?)\s*(?=[,\]}}])", text)
            if str(each) not in found:
                lost = next((it for it in found if _same(it, each)), str(each))
                quoted = f"'{lost}'" if name is None else f"{name}: '{lost}'"
                raise ConfigError(key, text, f"{_read_as(lost, each)}; quote it there: {quoted}")


def _same(text: str, value: Any) -> bool:
    return bool(yaml.load(text, get_yaml_loader()) == value)


def _read_as(text: str, value: Any) -> str:
    return f"{text} would be read as {value}, and this is a key of text"


def check_sweep(override: Override) -> None:
    """Raises ConfigError where a value of a sweep over a text key would arrive as another text."""
    key, value = override.get_key_element().lstrip("+"), override.value()
    if not _is_text(key) or not isinstance(value, ChoiceSweep):
        return
    line = str(override.input_line).partition("=")[2]
    inside = re.fullmatch(r"\s*\w+\((.*)\)\s*", line)
    texts = [text.strip() for text in (inside[1] if inside else line).split(",")]
    for each in value.list:
        if isinstance(each, (bool, int, float)) and str(each) not in texts:
            quoted = ",".join(f"'{text}'" if text[:1] not in "'\"" else text for text in texts)
            lost = next((text for text in texts if _same(text, each)), str(each))
            raise ConfigError(key, line, f'{_read_as(lost, each)}; type "{key}={quoted}"')


def check_files(loader: ConfigLoader, name: str, overrides: Sequence[str], mode: RunMode) -> None:
    """Raises ConfigError where a config file that is none of the product's own has, for a text key,
    what YAML reads as another text.
    """
    for default in loader.compute_defaults_list(name, list(overrides), mode).defaults:
        found = default.config_path and loader.repository.load_config(default.config_path)  # type: ignore[attr-defined]
        if not found or not found.path.startswith("file://"):
            continue
        directory = Path(found.path.removeprefix("file://"))
        if directory.resolve() == conf_dir().resolve():
            continue
        path = directory / f"{str(default.config_path).removesuffix('.yaml')}.yaml"
        for key, text, value in _scalars(path, default.package or ""):
            if _is_text(key.removeprefix(PARAMS)) and str(value) != text:
                quoted = f"{key.rpartition('.')[2]}: '{text}'"
                why = f"{_read_as(text, value)}; quote it in {path}: {quoted}"
                raise ConfigError(key, text, why)


def _scalars(path: Path, package: str) -> Iterator[tuple[str, str, Any]]:
    """Key, text and value of all in a YAML file that is neither a string nor null."""
    with path.open(encoding="utf-8") as file:
        loader = get_yaml_loader()(file)
        root = loader.get_single_node()

    def walk(node: Any, key: str) -> Iterator[tuple[str, str, Any]]:
        if isinstance(node, yaml.MappingNode):
            for name, child in node.value:
                yield from walk(child, f"{key}.{name.value}".lstrip("."))
        elif isinstance(node, yaml.SequenceNode):
            for child in node.value:
                yield from walk(child, key)
        elif isinstance(node, yaml.ScalarNode):
            value = loader.construct_object(node)
            if isinstance(value, (bool, int, float)):
                yield key, node.value, value

    yield from walk(root, "" if package == "_global_" else package)


def _is_text(key: str) -> bool:
    return key in text_keys() or key.startswith(f"{ENVIRONMENT}.") or key == ENVIRONMENT
