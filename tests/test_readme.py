"""The README's table of keys says what the schema says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from tp_trainer.config import Settings, shown

README = (Path(__file__).parent.parent / "README.md").read_text()


def settings(node: Any, prefix: str = "") -> dict[str, tuple[str, str]]:
    rows: dict[str, tuple[str, str]] = {}
    for each in dataclasses.fields(node):
        value, key = getattr(node, each.name), prefix + each.name
        if dataclasses.is_dataclass(value):
            rows |= settings(value, key + ".")
        else:
            default = "null" if value is None else "{}" if value == {} else shown(value)
            rows[key] = (default, each.metadata["help"])
    return rows


def test_the_table_has_every_key_with_its_default_and_meaning() -> None:
    table = {
        key: (default, text)
        for key, default, text in re.findall(
            r"^\| `([\w.]+)` \| `([^`]*)` \| (.*) \|$", README, re.MULTILINE
        )
    }
    expected = {
        key: row
        for key, row in settings(Settings()).items()
        if not key.startswith("model.recipe.") and key != "task"
    }
    assert set(table) == set(expected)
    for key, (default, text) in expected.items():
        assert table[key][0] == default and table[key][1].startswith(text), key
