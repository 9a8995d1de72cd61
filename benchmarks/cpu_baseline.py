"""Our tokens/s on CPU beside a plain transformers loop: the default model, batch and sequence, in
turn on the same cores.

    python benchmarks/cpu_baseline.py [--rounds 5] [--steps 30] [--layouts tp1_dp1 tp2_dp2]

The plain loop is below, a process of its own with as many torch threads as our worker has at
tp1_dp1: sdpa attention, the model's own loss, fused AdamW, clipping at 1.0, random tokens. Ours is
`task=bench` with its loop as it is. Printed are each program's tokens/s by its median step (median
over the rounds) and by its fastest step of all, which other users of the machine disturb the least,
and ours over plain by both. Other layouts have more workers than cores where those are few.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
BATCH = 4  # train.micro_batch_size


def plain(threads: int, warmup: int, steps: int) -> None:
    """Print the tokens/s of a plain training loop, by its median and by its fastest step."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    group = yaml.safe_load((ROOT / "conf" / "model" / "tiny.yaml").read_text())
    seq, vocabulary = group["recipe"]["seq_length"], group["architecture"]["vocab_size"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**group["architecture"]))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-7, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    model.train()
    marks = []
    for _ in range(warmup + steps + 1):
        ids = torch.randint(vocabulary, (BATCH, seq))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
    seconds = [
        after - before for before, after in zip(marks[warmup:], marks[warmup + 1 :], strict=False)
    ]
    print(BATCH * seq / statistics.median(seconds), BATCH * seq / min(seconds))


def ours(layout: str, warmup: int, steps: int) -> tuple[float, float, int]:
    """Our tokens/s in all, by the median and by the fastest step, and the torch threads of a
    worker.
    """
    with tempfile.TemporaryDirectory() as scratch:
        keys = [
            "task=bench",
            f"parallelism={layout}",
            f"train.micro_batch_size={BATCH}",
            "data=random",
            "cluster.device=cpu",
            f"bench.warmup={warmup}",
            f"bench.steps={steps}",
            "bench.profile_steps=0",
            f"checkpoint.storage_path={scratch}",
        ]
        subprocess.run(
            [sys.executable, "launch.py", *keys], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        row = json.loads(Path(scratch, "bench.jsonl").read_text(encoding="utf-8"))
    rate, step = row["tokens_per_second"], row["step_seconds"]
    return rate, rate * step["median"] / step["min"], row["environment"]["threads"]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=["tp1_dp1", "tp2_dp2"],
        help="the first one is held against the plain loop",
    )
    # the threads: this process is the plain loop
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.plain:
        plain(args.plain, args.warmup, args.steps)
        return
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ["plain", *args.layouts]}
    for number in range(args.rounds):
        for layout in args.layouts:
            median, fastest, threads = ours(layout, args.warmup, args.steps)
            rates[layout].append((median, fastest))
            if layout == args.layouts[0]:
                command = [
                    sys.executable,
                    __file__,
                    "--plain",
                    str(threads),
                    "--warmup",
                    str(args.warmup),
                    "--steps",
                    str(args.steps),
                ]
                said = subprocess.run(
                    command, check=True, capture_output=True, text=True
                ).stdout.split()
                rates["plain"].append((float(said[-2]), float(said[-1])))
        shown = ", ".join(
            f"{name} {each[-1][0]:,.0f} ({each[-1][1]:,.0f})" for name, each in rates.items()
        )
        print(
            f"round {number + 1}: {shown} tokens/s by the median (fastest) step; load"
            f" {os.getloadavg()[0]:.0f}",
            flush=True,
        )
    medians = {
        name: statistics.median(median for median, _ in each) for name, each in rates.items()
    }
    fastest_of = {name: max(fastest for _, fastest in each) for name, each in rates.items()}
    for name in rates:
        print(f"{name}: {medians[name]:,.0f} tokens/s, by the fastest step {fastest_of[name]:,.0f}")
    first = args.layouts[0]
    print(
        f"{first} / plain: {medians[first] / medians['plain']:.2f}, by the fastest step"
        f" {fastest_of[first] / fastest_of['plain']:.2f}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
