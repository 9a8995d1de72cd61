"""Trains for a while with a random fault every now and then, and holds the losses against a run
that nobody disturbed.

    python benchmarks/soak.py [--minutes 15] [--every 120] [--seed 0] [--storage DIR] [key=value]

The command is launch.py on this machine's CPU. Faults: a worker killed, killed while a checkpoint
is written, told to leave (SIGTERM) or stopped (SIGSTOP, found as a hang); the driver killed or told
to stop, after which the same command is given again. When the time is up the run is told to stop,
and a clean run of as many steps follows (it takes as long as the steps alone). The rate is
constant, so that no step depends on the length of the run. Prints a line per fault and the result
as JSON; exits with 1 where a loss differs or a run ended as it shouldn't.

Goodput: the time of the steps that count (each once, the time of its last doing) over the wall time
    since the first
command began.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KINDS = (
    "worker killed",
    "worker killed in a save",
    "worker told to leave",
    "worker stopped",
    "driver killed",
    "driver told to stop",
)
PATIENCE = 300  # seconds until a fault must have been overcome
BASE = (
    "parallelism=tp2_dp1",
    "tracker=none",
    "train.log_interval=1",
    "train.eval_interval=null",
    "train.eval_batches=1",
    "checkpoint.interval=50",
    "optim.schedule=constant",
    "optim.warmup_steps=10",
    "cluster.hang_seconds=20",
    "cluster.device=cpu",
    "data.seq_length=64",
)


class Soak:
    """A command that is given again and again, and what it leaves in its run's directory."""

    def __init__(self, storage: Path, name: str, overrides: list[str]) -> None:
        # a socket's path must be short
        self.run, self.ray = storage / name, Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
        self.log = storage / f"{name}.log"
        self.command = [
            sys.executable,
            str(ROOT / "launch.py"),
            *BASE,
            f"checkpoint.storage_path={storage}",
            f"experiment_name={name}",
            *overrides,
        ]
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        environment = {**os.environ, "RAY_TMPDIR": str(self.ray), "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def rows(self) -> list[dict[str, Any]]:
        with suppress(OSError):
            lines = (self.run / "metrics.jsonl").read_text().splitlines(keepends=True)
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            return [row for row in rows if "step_seconds" in row]
        return []

    def step(self) -> int:
        return max((row["step"] for row in self.rows()), default=0)

    def until_step(self, step: int) -> None:
        """Wait until that step is done. Raises SystemExit where the command ends before, or it
        takes too long.
        """
        began = time.monotonic()
        while self.step() < step:
            if self.process.poll() is not None:
                sys.exit(
                    f"the command ended with {self.process.returncode} at step {self.step()}; see"
                    f" {self.log}"
                )
            if time.monotonic() - began > PATIENCE:
                sys.exit(f"step {step} not done within {PATIENCE} s; see {self.log}")
            time.sleep(0.2)

    def workers(self) -> list[int]:
        """Of this command's Ray: they write their logs below its directory."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if b"RayTrainWorker" in (entry / "cmdline").read_bytes() and str(
                    self.ray
                ) in os.readlink(entry / "fd" / "1"):
                    found.append(int(entry.name))
        return sorted(found)

    def saving(self) -> None:
        """Wait until something of a new checkpoint appears."""
        before, until = self.entries(), time.monotonic() + PATIENCE
        while self.entries() <= before and time.monotonic() < until:
            time.sleep(0.005)

    def entries(self) -> set[str]:
        return {path.name for path in self.run.iterdir() if "step_" in path.name}

    def ended(self, code: int, patience: float = PATIENCE) -> None:
        if self.process.wait(patience) != code:
            sys.exit(
                f"the command ended with {self.process.returncode}, not {code}; see {self.log}"
            )

    def fault(self, kind: str, choose: random.Random) -> float:
        """Do it, and give the command again where it is gone. Seconds until five steps are done by
        new workers.
        """
        if "save" in kind:
            self.saving()
        old, began = set(self.workers()), time.monotonic()
        self.strike(kind, choose)
        # some live on for a while, and train
        while old & set(self.workers()) and time.monotonic() - began < PATIENCE:
            time.sleep(0.2)
        self.until_step(self.step() + 5)
        return time.monotonic() - began

    def strike(self, kind: str, choose: random.Random) -> None:
        if kind.startswith("driver"):
            number = signal.SIGKILL if "killed" in kind else signal.SIGTERM
            os.kill(self.process.pid, number)
            self.ended(-number if number == signal.SIGKILL else 128 + number)
            self.start()
            return
        number = (
            signal.SIGKILL
            if "killed" in kind
            else signal.SIGTERM
            if "leave" in kind
            else signal.SIGSTOP
        )
        os.kill(choose.choice(self.workers()), number)

    def close(self) -> None:
        with suppress(ProcessLookupError, AttributeError):
            self.process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument(
        "--every", type=float, default=120, help="seconds from one fault to the next"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of faults")
    parser.add_argument(
        "--storage", type=Path, help="where the runs go (default: a temporary directory)"
    )
    parser.add_argument("overrides", nargs="*", help="of launch.py's keys")
    given = parser.parse_args()
    storage = (given.storage or Path(tempfile.mkdtemp(prefix="soak-runs-"))).resolve()
    storage.mkdir(parents=True, exist_ok=True)
    choose = random.Random(given.seed)
    faults: list[dict[str, Any]] = []
    kinds: list[str] = []
    soak, clean = Soak(storage, "faults", [*given.overrides, "train.max_steps=1000000"]), None
    began = time.monotonic()
    try:
        soak.start()
        soak.until_step(10)
        first = time.monotonic() - began
        while (number := len(faults) + 1) and (
            due := first + number * given.every
        ) < given.minutes * 60:
            time.sleep(max(0.0, due - (time.monotonic() - began)))
            # each kind once before any comes again
            kinds = kinds or choose.sample(KINDS, len(KINDS))
            kind, at = kinds.pop(), soak.step()
            seconds = soak.fault(kind, choose)
            faults.append(
                {"kind": kind, "at_step": at, "five_steps_later_after": round(seconds, 1)}
            )
            print(
                f"{time.monotonic() - began:6.0f} s  {kind} at step {at}: five steps on after"
                f" {seconds:.1f} s",
                flush=True,
            )
        time.sleep(max(0.0, given.minutes * 60 - (time.monotonic() - began)))
        os.kill(soak.process.pid, signal.SIGTERM)
        soak.ended(143)
        wall = time.monotonic() - began
        rows = soak.rows()
        last = {row["step"]: row for row in rows}
        clean = Soak(storage, "clean", [*given.overrides, f"train.max_steps={len(last)}"])
        clean.start()
        clean.ended(0, PATIENCE + wall)
        expected = {row["step"]: row["loss"] for row in clean.rows()}
        differing = [step for step in sorted(expected) if last[step]["loss"] != expected[step]]
        result = {
            "minutes": round(wall / 60, 2),
            "faults": faults,
            "steps": len(last),
            "steps_done_again": len(rows) - len(last),
            "goodput": round(sum(row["step_seconds"] for row in last.values()) / wall, 4),
            "steps_without_gaps": sorted(last) == list(range(1, len(last) + 1)),
            "steps_whose_loss_differs": differing,
            "equal_to_the_clean_run": sorted(last) == sorted(expected) and not differing,
        }
        print(json.dumps(result, indent=1))
        return 0 if result["equal_to_the_clean_run"] else 1
    finally:
        soak.close()
        if clean is not None:
            clean.close()


if __name__ == "__main__":
    sys.exit(main())
