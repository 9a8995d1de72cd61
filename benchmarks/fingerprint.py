"""Whether a change to the code has changed a number: hashes of five steps in eight layouts, fp32,
CPU.

    python benchmarks/fingerprint.py > before.txt
    python benchmarks/fingerprint.py --against before.txt     # after the change

A line for each family and layout: a hash of the losses and gradient norms of all steps, of every
gradient at every step (whole, before clipping), and of every parameter after the last. Equal on one
machine with one release of torch; another machine's matmuls may round otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "distributed"))

from plain_reference import FAMILIES, settings_of
from rank_cases import trainer, whole
from rank_pool import RankPool

STEPS = 5
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1_dp1": {"tp": 1, "dp": 1},
    "tp2_dp1": {"tp": 2, "dp": 1},
    "tp4_dp1": {"tp": 4, "dp": 1},
    "tp1_dp2": {"tp": 1, "dp": 2},
    "tp1_dp4_rep2": {"tp": 1, "dp": 4, "dp_replicate": 2},
    "tp2_dp2": {"tp": 2, "dp": 2},
    "tp2_dp2_no_sp": {"tp": 2, "dp": 2, "sequence_parallel": False},
    "tp2_dp2_recomputed": {"tp": 2, "dp": 2, "activation_checkpointing": "selective"},
}
CHOSEN = ("qwen2", "gemma3_text_awkward", "phi3", "granite_awkward")


def hashes(settings: dict[str, Any]) -> list[str]:
    """A rank's hashes of its steps: numbers, gradients, parameters. A collective."""
    import torch

    torch.set_num_threads(1)
    made, gradients = trainer(settings), hashlib.sha256()

    def take() -> None:
        for name, parameter in made.model.module.named_parameters():
            if parameter.grad is not None:
                gradients.update(name.encode() + whole(parameter.grad).numpy().tobytes())

    numbers = [made.step(masked=True, before_clipping=take) for _ in range(STEPS)]
    parameters = hashlib.sha256()
    for name, parameter in made.model.module.named_parameters():
        parameters.update(name.encode() + whole(parameter).numpy().tobytes())
    spoken = hashlib.sha256(repr(numbers).encode())
    return [each.hexdigest()[:16] for each in (spoken, gradients, parameters)]


def lines() -> list[str]:
    pool, found = RankPool(), []
    try:
        for family in CHOSEN:
            for layout, parallelism in LAYOUTS.items():
                settings = settings_of(FAMILIES[family], parallelism=parallelism)
                ranks = pool.run(parallelism["tp"] * parallelism["dp"], hashes, settings)
                assert all(each == ranks[0] for each in ranks), f"{family} {layout}: ranks differ"
                numbers, gradients, parameters = ranks[0]
                line = f"{family} {layout} numbers {numbers}"
                found.append(f"{line} gradients {gradients} parameters {parameters}")
                print(found[-1], flush=True)
    finally:
        pool.stop()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--against", type=Path, help="the output of another time: 1 if a line differs"
    )
    before = parser.parse_args().against
    now = lines()
    if before is not None and before.read_text().splitlines() != now:
        changed = set(now) - set(before.read_text().splitlines())
        sys.exit("\n".join(["changed:", *sorted(changed)]))
