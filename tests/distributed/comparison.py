"""A run on several ranks against the reference."""

from __future__ import annotations

from typing import Any

import pytest

TOLERANCE = 1e-5  # relative, fp32


def compare(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Ranks agree with one another bit for bit; losses, norms and final parameters with the
    reference within TOLERANCE.
    """
    for each in results:
        assert each["losses"] == results[0]["losses"] and each["norms"] == results[0]["norms"], (
            "ranks disagree"
        )
    got = results[0]
    assert min(expected["norms"]) > 0.1, "clipping is not active"
    assert got["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE, abs=0)
    assert got["norms"] == pytest.approx(expected["norms"], rel=TOLERANCE, abs=0)
    assert set(got["parameters"]) == set(expected["parameters"])
    off = {
        name: ((got["parameters"][name] - value).norm() / value.norm()).item()
        for name, value in expected["parameters"].items()
    }
    assert max(off.values()) <= TOLERANCE, {
        name: part for name, part in off.items() if part > TOLERANCE
    }


def certify(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """The tolerances of task=verify in float32; of a parameter's gradient, the norm is floored at
    1e-6 of the whole one's. Gradients are compared with float64's: where a sum cancels (a scalar of
    an activation), plain float32's error is as large as ours, and the two may add up.
    """
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-6, abs=0)
    assert got["norms"] == pytest.approx(expected["norms"], rel=1e-5, abs=0)
    floor = 1e-6 * expected["norms"][0]
    assert set(got["gradients"]) == set(expected["gradients"])
    off = {
        name: ((got["gradients"][name].double() - value).norm() / max(value.norm(), floor)).item()
        for name, value in expected["gradients"].items()
    }
    assert max(off.values()) <= 1e-5, {name: part for name, part in off.items() if part > 1e-5}
    assert max(off.values()) > 0, "compared with itself"
