"""Ours, torchtitan and the tutorial's way on the same GPUs, in turn: Llama 3 8B, random tokens,
bf16 compute, no recomputation.

    python benchmarks/compare.py --cells tp2_dp1_2048x4 tp1_dp2_2048x4 \\
        --programs ours torchtitan tutorial --results results.jsonl

A cell is a layout with tokens a row x rows a micro-batch; tp2_dp1_2048x4_16layers is of a model cut
to 16 layers, for GPUs with less memory (torchtitan's script must take the number from LAYERS; the
tutorial's can't).

Each measurement is a line of `--results`; a program that fails or takes
too long is told of in one line, and the rest go on. torchtitan runs with its loss parallel on and
off; the better one counts. MFU is one formula for all (tp_trainer.metrics). The peers' scripts
(torchtitan.sh, tutorial.py) lie in `--peers`, not in this repository.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tp_trainer.config import Architecture
from tp_trainer.metrics import flops_per_token, mfu, peak_of
from tp_trainer.tasks.bench import commit

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS, MODEL = ("ours", "torchtitan", "tutorial"), "llama3_8b"
Row = dict[str, Any]


class Failed(Exception):
    """A program gave no figure."""


class Cell(NamedTuple):
    tp: int
    dp: int
    seq: int
    batch: int
    layers: int | None = None  # of the model, where it is cut

    @classmethod
    def of(cls, name: str) -> Cell:
        """From tp2_dp1_2048x4. Raises ArgumentTypeError."""
        if not (found := re.fullmatch(r"tp(\d+)_dp(\d+)_(\d+)x(\d+)(?:_(\d+)layers)?", name)):
            raise argparse.ArgumentTypeError(
                f"{name}: a cell is tp<N>_dp<N>_<tokens>x<rows>, e.g. tp2_dp1_2048x4"
            )
        return cls(*(number and int(number) for number in found.groups()))

    def __str__(self) -> str:
        return f"tp{self.tp}_dp{self.dp}_{self.seq}x{self.batch}" + (
            f"_{self.layers}layers" if self.layers else ""
        )


def parse_torchtitan(output: str) -> Row:
    """Figures from torchtitan.sh's line: the median of the logged windows' tokens/s, the most
    memory. Raises Failed.
    """
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"\btps: *([\d,]+)", output)]
    memory = [float(gib) for gib in re.findall(r"\bmemory: *([\d.]+)GiB", output)]
    if not rates or not memory:
        raise Failed(last_line(output))
    return {"tokens_per_second_per_gpu": statistics.median(rates), "peak_gib": max(memory)}


def parse_tutorial(output: str) -> Row:
    """Figures from tutorial.py's line of JSON. Raises Failed."""
    if not (lines := re.findall(r'^\{.*"tokens_per_s_per_gpu".*\}$', output, re.MULTILINE)):
        raise Failed(last_line(output))
    said = json.loads(lines[-1])
    return {"tokens_per_second_per_gpu": said["tokens_per_s_per_gpu"], "peak_gib": said["peak_gib"]}


def last_line(output: str) -> str:
    """The line that says what went wrong: the last error's, else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if re.search(r"\b\w*Error\b|failed", line)),
        lines[-1] if lines else "said nothing",
    )[:300]


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: a row a cell, the median of each program's rounds, torchtitan's better variant, our
    ratio to each peer.
    """
    seen: dict[tuple[str, str], dict[Any, list[Mapping[str, Any]]]] = {}
    for row in rows:
        seen.setdefault((row["cell"], row["program"]), {}).setdefault(
            row.get("loss_parallel"), []
        ).append(row)

    def best(cell: str, program: str) -> tuple[float, str] | None:
        if (cell, program) not in seen:
            return None
        variants = [
            (statistics.median(row["tokens_per_second_per_gpu"] for row in rows), rows)
            for rows in seen[cell, program].values()
        ]
        rate, rows = max(variants, key=lambda variant: variant[0])
        share = statistics.median(row["mfu"] or 0 for row in rows)
        return (
            rate,
            (
                f"{rate:,.0f}"
                f" ({f'{share:.1%}, ' if share else ''}{max(row['peak_gib'] for row in rows):.1f}"
                " GiB)"
            ),
        )

    lines = [
        f"| cell | {' | '.join(PROGRAMS)} | ours/torchtitan | ours/tutorial |",
        "|---|---|---|---|---|---|",
    ]
    for cell in dict.fromkeys(cell for cell, _ in seen):
        figures = [best(cell, program) for program in PROGRAMS]
        ratios = [
            f"{figures[0][0] / peer[0]:.2f}" if figures[0] and peer else "" for peer in figures[1:]
        ]
        lines.append(
            "| "
            + " | ".join([cell, *(each[1] if each else "" for each in figures), *ratios])
            + " |"
        )
    return "\n".join(lines)


def execute(command: Sequence[str], limit: float, **env: str) -> str:
    """What a command prints, both streams. Its process group ends with it. Raises Failed past
    `limit` seconds.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"not done within {limit:g} s") from None
        finally:
            # at the first one Ray ends its processes, which have groups of their own
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(15)
        output.seek(0)
        return output.read()


def ours(cell: Cell, args: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        cut = [f"model.overrides.num_hidden_layers={cell.layers}"] if cell.layers else []
        command = [
            "launch.py",
            "task=bench",
            f"parallelism.tp={cell.tp}",
            f"parallelism.dp={cell.dp}",
            f"model={MODEL}",
            *cut,
            "data=random",
            f"data.seq_length={cell.seq}",
            f"train.micro_batch_size={cell.batch}",
            *shlex.split(args.ours),
        ]
        output = execute(
            [
                sys.executable,
                *command,
                f"bench.output={scratch}/rows",
                f"checkpoint.storage_path={scratch}",
            ],
            args.limit,
        )
        if not Path(scratch, "rows").exists():
            raise Failed(last_line(output))
        yield {
            **json.loads(Path(scratch, "rows").read_text(encoding="utf-8")),
            "trace": None,
            "command": shlex.join(["python", *command]),
        }


def torchtitan(cell: Cell, args: argparse.Namespace) -> Iterator[Row]:
    env = {"GPUS": str(cell.tp * cell.dp)} | ({"LAYERS": str(cell.layers)} if cell.layers else {})
    both = args.loss_parallel == "both" and cell.tp > 1
    for loss_parallel in (True, False) if both else (args.loss_parallel != "off",):
        flags = (
            f"--training.seq_len {cell.seq} --training.local_batch_size {cell.batch}"
            f" --parallelism.tensor_parallel_degree {cell.tp}"
            f" --parallelism.data_parallel_shard_degree {cell.dp} --compile.enable"
            " --activation_checkpoint.mode"
            f" none{'' if loss_parallel else ' --parallelism.disable_loss_parallel'}"
        )
        try:
            found = parse_torchtitan(
                execute(
                    ["bash", str(args.peers / "torchtitan.sh"), f"{cell}|{flags}"],
                    args.limit + 60,
                    LIMIT=f"{args.limit:g}",
                    **env,
                )
            )
        except Failed as error:  # the other variant may do
            print(
                f"{cell} torchtitan: failed with loss parallel {'on' if loss_parallel else 'off'}:"
                f" {error}",
                flush=True,
            )
            continue
        given = " ".join(f"{key}={value}" for key, value in env.items())
        yield {
            **found,
            "loss_parallel": loss_parallel,
            "command": f"{given} torchtitan.sh '{cell}|{flags}'",
        }


def tutorial(cell: Cell, args: argparse.Namespace) -> Iterator[Row]:
    if cell.layers:
        raise Failed("its script takes no number of layers")
    processes = [
        "--nproc-per-node",
        str(cell.tp * cell.dp),
        "--master-port",
        str(random.randint(20000, 29999)),
    ]
    arguments = [
        "--model",
        MODEL,
        "--tp",
        str(cell.tp),
        "--batch",
        str(cell.batch),
        "--seq",
        str(cell.seq),
    ]
    for more in ([], ["--foreach-off"]):
        try:
            found = parse_tutorial(
                execute(
                    [
                        sys.executable,
                        "-m",
                        "torch.distributed.run",
                        *processes,
                        str(args.peers / "tutorial.py"),
                        *arguments,
                        *more,
                    ],
                    args.limit,
                )
            )
        except Failed:
            if cell.dp > 1 or more:  # as it stands, its AdamW can't do dp=1
                raise
            continue
        yield {
            **found,
            "foreach_off": bool(more),
            "command": shlex.join(["torchrun", *processes[:2], "tutorial.py", *arguments, *more]),
        }
        return


def measure(cell: Cell, program: str, args: argparse.Namespace) -> Iterator[Row]:
    """The rows of one program on one cell, each with the keys that all have. Raises Failed."""
    architecture = yaml.safe_load((ROOT / "conf" / "model" / f"{MODEL}.yaml").read_text())[
        "architecture"
    ]
    if cell.layers:
        architecture["num_hidden_layers"] = cell.layers
    numbers = Architecture.of(architecture, MODEL)
    tables = 0 if numbers.tie_word_embeddings else numbers.vocab_size * numbers.hidden_size
    flops = flops_per_token(numbers.num_parameters - tables, numbers, cell.seq)
    for row in {"ours": ours, "torchtitan": torchtitan, "tutorial": tutorial}[program](cell, args):
        yield {
            **row,
            "date": f"{datetime.datetime.now().astimezone():%Y-%m-%dT%H:%M:%S%z}",
            "cell": str(cell),
            "program": program,
            "commit": args.commit,
            "mfu": mfu(row["tokens_per_second_per_gpu"], flops, args.peak),
        }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", type=Cell.of, required=True)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--results", type=Path, default=Path("results.jsonl"))
    parser.add_argument(
        "--peers", type=Path, default=ROOT / "peers", help="where torchtitan.sh and tutorial.py lie"
    )
    parser.add_argument("--limit", type=float, default=240, help="seconds for one run of a program")
    parser.add_argument(
        "--loss-parallel",
        choices=("both", "on", "off"),
        default="both",
        help="torchtitan's variants",
    )
    parser.add_argument(
        "--ours", default="", help="more of launch.py's keys for ours, in one string"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument(
        "--commit", default=commit(ROOT / "tp_trainer"), help="where the copy is not under git"
    )
    args = parser.parse_args(argv)
    gpus = subprocess.run(
        "nvidia-smi --query-gpu=name --format=csv,noheader",
        shell=True,
        capture_output=True,
        text=True,
    ).stdout
    args.peers, args.peak, rows = args.peers.resolve(), peak_of(gpus), list[Row]()
    for cell, round_, program in product(args.cells, range(1, args.rounds + 1), args.programs):
        try:
            for row in measure(cell, program, args):
                with open(args.results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
                print(
                    f"{cell} {program}, round {round_}: {row['tokens_per_second_per_gpu']:,.0f}"
                    f" tokens/s per GPU, {row['peak_gib']:.1f} GiB",
                    flush=True,
                )
        except Failed as error:
            print(f"{cell} {program}, round {round_}: failed: {error}", flush=True)
    print(table(rows))
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
