"""A field of the schema: its default, its meaning and the values that it may take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any


def setting(
    default: Any,
    help: str,
    *,
    one_of: Sequence[str] | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    why_not: Mapping[str, str] = {},
) -> Any:
    """A dataclass field with its meaning and the values that it may take (null is always let
    through).

    Args:
        why_not: of values that one would expect in `one_of`.
    """
    bounds = {"least": least, "above": above, "most": most, "below": below}
    metadata = {"help": help, "one_of": one_of, "why_not": why_not, **bounds}
    if isinstance(default, (list, dict)):
        kind = type(default)
        return field(default_factory=lambda: kind(default), metadata=metadata)
    return field(default=default, metadata=metadata)


DTYPES = ("float32", "bfloat16", "float16")
UNSCALED = {
    "float16": "small gradients are 0 in float16, and there is no loss scaling: give bfloat16"
}
