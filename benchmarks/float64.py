"""Step 1's gradients of Qwen3.5's decays: how far float32 is from float64, ours and plain
transformers'.

    python benchmarks/float64.py

Prints, for `A_log` as drawn and as the tests have it, relative differences to float64.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "distributed"))

import torch
from plain_reference import FAMILIES, Reference, global_batches, plain_model, settings_of
from rank_cases import run_steps
from rank_pool import RankPool

CASES = {"qwen3_5_text": {"tp": 1, "dp": 4}, "qwen3_5_text_awkward": {"tp": 4, "dp": 1}}
SHIFT = 2.0  # what plain_model takes off


def main() -> None:
    pool = RankPool(4)
    try:
        with tempfile.TemporaryDirectory() as directory:
            for family, layout in CASES.items():
                for shift in (SHIFT, 0.0):
                    show(pool, f"{directory}/{family}-{shift}", family, layout, shift)
    finally:
        pool.stop()


def show(pool: RankPool, path: str, family: str, layout: dict[str, int], shift: float) -> None:
    model = plain_model(FAMILIES[family])
    decays = [name for name, _ in model.named_parameters() if name.endswith(("A_log", "dt_bias"))]
    for name in decays:
        if name.endswith("A_log"):
            model.get_parameter(name).data.add_(SHIFT - shift)
    model.save_pretrained(path)
    train = {"micro_batch_size": min(4, 8 // layout["dp"])}
    settings = settings_of(path, parallelism=layout, optim={"lr": 1e-4}, train=train)
    batches = global_batches(settings, 1)
    plain = Reference(settings).run(batches)["gradients"]
    ours = pool.run(layout["tp"] * layout["dp"], run_steps, settings, 1)[0]["gradients"]
    exact = Reference(settings)
    exact.model.double()
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):  # casts within the model
        true = exact.run(batches)["gradients"]
    for name in decays:
        off = [
            float((each[name] - true[name]).norm() / true[name].norm()) for each in (ours, plain)
        ]
        print(f"{family} {layout} A_log - {shift} {name}: ours {off[0]:.1e} plain {off[1]:.1e}")


if __name__ == "__main__":
    main()
