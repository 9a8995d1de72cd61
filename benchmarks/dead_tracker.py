"""What a tracker that dies, hangs or was never there costs a training run: seconds of its slowest
step, and at its end.

    python benchmarks/dead_tracker.py killed|stopped|silent|well [key=value ...]

starts an MLflow server (package mlflow) and a training run that tracks there, and once 15 steps
are done kills it (SIGKILL) or stops it (SIGSTOP: it accepts and answers nothing any more); `silent`
is a socket that accepts and never answers, from the start; `well` is left alone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS, STRIKE = 40, 15


def server(port: int, directory: Path) -> subprocess.Popen[bytes]:
    """An MLflow server that answers."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--port",
            str(port),
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{directory}/mlflow.db",
            "--artifacts-destination",
            str(directory),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while True:
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return process
        time.sleep(0.5)


def rows(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in found if "loss" in row]


def main(kind: str, *overrides: str) -> None:
    directory = Path(tempfile.mkdtemp(prefix="dead_tracker_"))
    listening = socket.create_server(("127.0.0.1", 0), backlog=1000)
    port = listening.getsockname()[1]
    served = None
    if kind != "silent":
        listening.close()
        served = server(port, directory)
    run = directory / "run"
    began = time.monotonic()
    launched = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "launch.py"),
            "tracker=mlflow",
            f"tracker.uri=http://127.0.0.1:{port}",
            "train.log_interval=1",
            f"train.max_steps={STEPS}",
            "experiment_name=run",
            f"checkpoint.storage_path={directory}",
            "checkpoint.interval=20",
            "parallelism=tp2_dp1",
            *overrides,
        ],
    )
    last, struck = None, kind in ("silent", "well")
    while launched.poll() is None:
        seen = rows(run)
        if served is not None and not struck and seen and seen[-1]["step"] >= STRIKE:
            os.killpg(served.pid, signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
            struck = True
            print(f"--- the server is {kind} at step {seen[-1]['step']}", flush=True)
        if last is None and seen and seen[-1]["step"] == STEPS:
            last = time.monotonic()
        time.sleep(0.05)
    ended = time.monotonic()
    if served is not None and kind != "killed":
        os.killpg(served.pid, signal.SIGKILL)
    seconds = [row["step_seconds"] for row in rows(run) if row["step"] > 1]
    summary = json.loads((run / "summary.json").read_text())
    print(
        json.dumps(
            {
                "kind": kind,
                "exit": launched.returncode,
                "steps": len(seconds) + 1,
                "slowest_step": round(max(seconds), 2),
                "median_step": round(sorted(seconds)[len(seconds) // 2], 3),
                "startup_seconds": round(summary["startup_seconds"], 1),
                "from_last_row_to_the_end": round(ended - (last or ended), 1),
                "in_all": round(ended - began, 1),
                "tracker_error": summary.get("tracker_error"),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
