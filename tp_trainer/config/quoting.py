"""What to type, so that it works when pasted: through the shell, then through Hydra's grammar."""

from __future__ import annotations

import re
import shlex

PLAIN = re.compile(r"[\w./:@+*?-]+", re.ASCII)  # what Hydra reads as it stands,
OTHER = re.compile(  # unless it reads more in it than text
    r"null|true|false|[+-]?(?:inf|nan|(?=.*\d)[\d._]+(?:e[+-]?\d+)?)", re.IGNORECASE
)


def hydra_text(value: str) -> str:
    """The right side of an override whose value is this text."""
    if PLAIN.fullmatch(value) and not OTHER.fullmatch(value):
        return value
    # backslashes count before a quote, before ${ and at the end, and are text elsewhere
    return '"' + re.sub(r'(\\*)("|\$\{|\Z)', _escaped, value) + '"'


def _escaped(found: re.Match[str]) -> str:
    return found[1] * 2 + (f"\\{found[2]}" if found[2] else "")


def assignment(key: str, value: object) -> str:
    """`key=value`, quoted as shell and Hydra want it."""
    text = hydra_text(str(value))
    return word(f"{key}={text}") if text.startswith('"') else f"{key}={word(text)}"


def pasted(key: str, value: object) -> str:
    """A value by itself where it can be typed as it stands, else `assignment`."""
    whole = assignment(key, value)
    return str(value) if whole == f"{key}={value}" else whole


def word(value: object) -> str:
    """A word of a command line."""
    return shlex.quote(str(value))
