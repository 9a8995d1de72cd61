"""What Hydra raised while composing, as one sentence about the override that caused it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tp_trainer.config import ConfigError, known_keys, nearest, translate, unknown_key
from tp_trainer.config.quoting import OTHER, assignment


@dataclass(frozen=True)
class Composition:
    """What was typed, and what can be chosen."""

    typed: Mapping[str, str]  # key -> value, as on the command line
    loader: ConfigLoader

    @property
    def groups(self) -> list[str]:
        return [group for group in self.loader.list_groups("") if group != "hydra"]

    def options(self, group: str) -> list[str]:
        return self.loader.get_group_options(group, ObjectType.CONFIG)


def explain(error: Exception, typed: Mapping[str, str], loader: ConfigLoader) -> ConfigError:
    """The sentence for what Hydra, OmegaConf or YAML raised.

    Args:
        typed: keys and values of the overrides that were composed.
    """
    what, text = Composition(typed, loader), str(error)
    if isinstance(error, YAMLError):
        return ConfigError("", None, f"a config file can't be read: {text}")
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if misplaced := _misplaced_experiment(text, what):
        return misplaced
    if isinstance(error, MissingConfigException):
        return _no_such_option(text, what)
    for pattern, sentence in SENTENCES:
        if found := re.search(pattern, text, re.MULTILINE):
            return sentence(found, what)
    cause: BaseException | None = error
    if not isinstance(error, OmegaConfBaseException):
        cause = error.__cause__ or error.__context__
    if isinstance(cause, OmegaConfBaseException) and (refused := _of_value(cause, text, typed)):
        return refused
    key = next(
        (
            key
            for key, value in typed.items()
            if key and (f"{key}=" in text or (value and value in text))
        ),
        "",
    )
    return ConfigError(key, typed.get(key), text.splitlines()[0].rstrip("."))


def _unreadable(override: str) -> ConfigError:
    """An override that Hydra's grammar doesn't know."""
    key, equals, value = override.partition("=")
    if not equals:
        return ConfigError(key, None, f"has no '='; type {key}=<value>, or {key}=null to unset it")
    if not re.fullmatch(r"[+~]*[\w./@-]+", key):
        hint = "keys are words with dots between, a list is given whole: key=[a,b]"
        return ConfigError(key, value, f"is no key; {hint}")
    text = value[1:-1] if len(value) > 1 and value[0] == value[-1] in "'\"" else value
    return ConfigError(key, value, f"can't be read; quote the value: {assignment(key, text)}")


def _misplaced_experiment(text: str, what: Composition) -> ConfigError | None:
    """An experiment whose keys are put under `experiment`, for want of a first line."""
    chosen = re.findall(r"[^\[\],\s'\"]+", what.typed.get("experiment", ""))
    chosen += re.findall(r"In 'experiment/(.+?)'", text)
    for name in chosen:
        try:
            found = what.loader.repository.load_config(f"experiment/{name}")  # type: ignore[attr-defined]
        except (YAMLError, OSError, ValueError):
            continue
        if found is None:
            continue
        package = str(found.header.get("package") or "experiment")
        if package.split(".")[0] not in {"_global_", *what.groups} - {"experiment"}:
            said = "says no package" if package == "experiment" else f"says {package}"
            return ConfigError(
                "experiment",
                name,
                f"experiment/{name}.yaml {said}; its first line must be: # @package _global_",
            )
    return None


def _no_such_option(text: str, what: Composition) -> ConfigError:
    if not (found := re.match(r"(?:In '(.+?)': )?Could not find '(.+)/(.*)'", text)):
        return ConfigError("", None, text.splitlines()[0])
    place, group, option = found.groups()
    near = nearest(option, what.options(group))
    where = "" if place in (None, "config", "hydra/config") else f" (in {place})"
    return ConfigError(
        group,
        option,
        f"no such option{where}; {f'did you mean {near}? ' if near else ''}options:"
        f" {', '.join(what.options(group))}",
    )


def _of_value(
    error: OmegaConfBaseException, text: str, typed: Mapping[str, str]
) -> ConfigError | None:
    """A key or value that the schema doesn't take; None where the key is none of the user's."""
    refused = translate(error)
    if place := re.match(r"In '(.+?)':", text):  # the fault is in a file
        return ConfigError(refused.key, refused.value, f"{refused.message} (in {place[1]}.yaml)")
    if refused.key not in typed:  # OmegaConf names the level at which it stopped
        for key, value in typed.items():
            if key.startswith(f"{refused.key}."):
                return unknown_key(key, value)
    if refused.key.startswith("_"):  # `_dummy_`: Hydra's own scaffolding
        return None
    message = refused.message
    if message.startswith("must be one value") and refused.key in typed:
        quoted = assignment(refused.key, typed[refused.key])
        message += f"; text in brackets has quotes: {quoted}"
    return ConfigError(refused.key, typed.get(refused.key, refused.value), message)


# -------------------------------------------------------- by the texts of Hydra's other exceptions


def _several_values(found: re.Match[str], what: Composition) -> ConfigError:
    key, value = found.groups()
    message = f"one value is wanted; a list is {key}=[a,b], a sweep needs -m (--multirun)"
    if key not in what.groups and not all(map(OTHER.fullmatch, value.split(","))):
        message += f", text with a comma its quotes: {assignment(key, value)}"
    return ConfigError(key, value, message)


def _group_without_option(found: re.Match[str], what: Composition) -> ConfigError:
    """Hydra doesn't say which one: a group given a number, null or no key at all."""
    typed, groups = what.typed, what.groups
    if "" in typed:
        return ConfigError("", None, f"={typed['']}: has no key; type key=value")
    unknown = (
        key for key in typed if key in groups and nearest(typed[key], what.options(key)) is None
    )
    key = next(unknown, "")
    message = f"the name of an option is wanted; options: {', '.join(what.options(key))}"
    return ConfigError(key, typed.get(key), message)


def _added_group(found: re.Match[str], what: Composition) -> ConfigError:
    key = found[1] or found[2]
    option = what.typed.get(key, "<option>")
    return ConfigError(key, what.typed.get(key), f"a group is chosen without +: {key}={option}")


def _deleted(found: re.Match[str], what: Composition) -> ConfigError:
    key = found[1]
    if key not in known_keys():
        return unknown_key(key)
    return ConfigError(f"~{key}", None, f"keys can't be deleted; {key}=null unsets it")


def _moved_group(found: re.Match[str], what: Composition) -> ConfigError:
    group = nearest(found[2], what.groups) or "<group>"
    message = f"groups keep their place here; type {group}=<option>"
    return ConfigError(found[1], what.typed.get(found[1]), message)


SENTENCES: tuple[tuple[str, Callable[[re.Match[str], Composition], ConfigError]], ...] = (
    (
        r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)=(.*)'(?:$| requires)",
        _several_values,
    ),
    (r"Config group override must be", _group_without_option),
    (
        r"\A'?(.+?)'? appears more than once"
        r"|\Aforce-add of config groups is not supported: '\+\+(.+?)=",
        _added_group,
    ),
    (r"Could not delete from config. '(.+?)' does not exist", _deleted),
    (r"(?:Override |Could not override ')((\w+)@[^=']+)", _moved_group),
)
