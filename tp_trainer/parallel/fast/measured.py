"""Where a fast path is the default: the layouts in which it was timed and won (RESULTS.md)."""

from __future__ import annotations

Layout = tuple[int, int, int]  # tp, shards, replicas

DEFAULTS: dict[str, frozenset[Layout]] = {
    "async_tp": frozenset({(2, 1, 1)}),
    "direct_fsdp": frozenset({(1, 2, 1)}),
}
