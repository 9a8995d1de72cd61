"""Our tokens/s on CPU beside a plain transformers loop: the default model, batch and sequence, in turn on the same cores.

    python benchmarks/cpu_baseline.py [--rounds 5] [--steps 30] [--layouts tp1_dp1 tp2_dp2]

The plain loop is below, a process of its own with as many torch threads as our worker has at tp1_dp1: sdpa attention, the
model's own loss, fused AdamW, clipping at 1.0, random tokens. Ours is `task=bench` with its loop as it is. Printed are each
figure's median over the rounds and, in a round, ours over plain (median, lowest, highest). Other layouts have more workers
than cores where those are few.
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
    """Print the median tokens/s of a plain training loop."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    group = yaml.safe_load((ROOT / "conf" / "model" / "tiny.yaml").read_text())
    seq, vocabulary = group["recipe"]["seq_length"], group["architecture"]["vocab_size"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**group["architecture"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model.train()
    marks = []
    for _ in range(warmup + steps + 1):
        ids = torch.randint(vocabulary, (BATCH, seq))
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks.append(time.perf_counter())
    seconds = [after - before for before, after in zip(marks[warmup:], marks[warmup + 1 :], strict=False)]
    print(BATCH * seq / statistics.median(seconds))


def ours(layout: str, warmup: int, steps: int) -> tuple[float, int]:
    """Our tokens/s in all, and the torch threads of a worker."""
    with tempfile.TemporaryDirectory() as scratch:
        keys = ["task=bench", f"parallelism={layout}", f"train.micro_batch_size={BATCH}", "data=random", "cluster.device=cpu",
                f"bench.warmup={warmup}", f"bench.steps={steps}", "bench.profile_steps=0",
                f"checkpoint.storage_path={scratch}"]  # fmt: skip
        subprocess.run([sys.executable, "launch.py", *keys], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        row = json.loads(Path(scratch, "bench.jsonl").read_text())
    return row["tokens_per_second"], row["environment"]["threads"]


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--layouts", nargs="+", default=["tp1_dp1", "tp2_dp2"], help="the first one is held against the plain loop")
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)  # the threads: this process is the plain loop
    args = parser.parse_args(argv)
    if args.plain:
        plain(args.plain, args.warmup, args.steps)
        return
    rates: dict[str, list[float]] = {layout: [] for layout in ["plain", *args.layouts]}
    for number in range(args.rounds):
        for layout in args.layouts:
            rate, threads = ours(layout, args.warmup, args.steps)
            rates[layout].append(rate)
            if layout == args.layouts[0]:
                command = [sys.executable, __file__, "--plain", str(threads), "--warmup", str(args.warmup), "--steps", str(args.steps)]
                rates["plain"].append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
        said = ", ".join(f"{name} {each[-1]:,.0f}" for name, each in rates.items())
        print(f"round {number + 1}: {said} tokens/s; load {os.getloadavg()[0]:.0f}", flush=True)
    for name, each in rates.items():
        print(f"{name}: {statistics.median(each):,.0f} tokens/s (median of {len(each)}; {min(each):,.0f} to {max(each):,.0f})")
    ratios = [mine / theirs for mine, theirs in zip(rates[args.layouts[0]], rates["plain"], strict=True)]
    print(f"{args.layouts[0]} / plain: {statistics.median(ratios):.2f} (median of the rounds; {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main(sys.argv[1:])
