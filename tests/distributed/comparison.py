"""A run on several ranks against the reference."""

from __future__ import annotations

from typing import Any

import pytest

TOLERANCE = 1e-5  # relative, fp32


def compare(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Ranks agree with one another bit for bit; losses, norms and final parameters with the reference within TOLERANCE."""
    for each in results:
        assert each["losses"] == results[0]["losses"] and each["norms"] == results[0]["norms"], "ranks disagree"
    got = results[0]
    assert min(expected["norms"]) > 0.1, "clipping is not active"
    assert got["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE, abs=0)
    assert got["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE, abs=0)
    assert set(got["parameters"]) == set(expected["parameters"])
    off = {name: ((got["parameters"][name] - value).norm() / value.norm()).item() for name, value in expected["parameters"].items()}
    assert max(off.values()) <= TOLERANCE, {name: part for name, part in off.items() if part > TOLERANCE}
