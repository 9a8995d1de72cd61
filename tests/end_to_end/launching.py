"""Runs of the whole program: launch.py as a process of its own, on a Ray of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from stillness import Stillness

ROOT = Path(__file__).resolve().parents[2]
HANGS = (10.0, 60.0)  # CPU seconds of driver and Ray in so many; a Ray that idles takes 1.3
QUICK = (
    "model.overrides.num_hidden_layers=1",
    "data.seq_length=32",
    "train.eval_batches=1",
    "train.log_interval=1",
    "checkpoint.interval=4",
)


@dataclass
class Ended:
    """What is left of a program that has ended."""

    code: int  # as a shell counts it: 128 + signal
    out: str
    err: str
    seconds: float
    cpu_seconds: float  # what it took of the processors, whatever else they had to do

    def __str__(self) -> str:
        return (
            f"exit {self.code} after {self.seconds:.1f} s\n--- stdout\n{self.out}---"
            f" stderr\n{self.err}"
        )


def _children() -> float:
    """Processor seconds of all child processes that have ended."""
    return sum(os.times()[2:4])


class Running:
    """A program that runs, in a process group of its own."""

    def __init__(
        self,
        command: list[str],
        cwd: Path,
        env: dict[str, str],
        others: Callable[[], Iterable[int]],
    ) -> None:
        self.others = others  # the processes that work for it
        # closed by wait()
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        self.began, self.used = time.monotonic(), _children()
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self.files[0],
            stderr=self.files[1],
            start_new_session=True,
            # a shell's background jobs ignore it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def stillness(self, window: float = HANGS[1]) -> Stillness:
        return Stillness(lambda: {self.pid, *self.others()}, HANGS[0], window)

    def wait(self, window: float = HANGS[1]) -> Ended:
        """Wait for its end. If it stands still it is killed, and the test fails with what it said.

        Args:
            window: in which it stands still; longer where it waits for a timer.
        """
        still = self.stillness(window)
        while (code := self.process.poll()) is None and not still():
            time.sleep(0.05)
        hangs = code is None
        if code is None:
            self.kill()
            code = self.process.wait()
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        ended = Ended(
            code if code >= 0 else 128 - code,
            texts[0],
            texts[1],
            time.monotonic() - self.began,
            _children() - self.used,
        )
        assert not hangs, f"stands still, {still}: {ended}"
        return ended

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


class Launcher:
    """Starts launch.py in one working directory, and knows the processes of the Rays that come with
    it.
    """

    def __init__(self, cwd: Path, cache: Path) -> None:
        self.cwd, self.storage = cwd, cwd / "outputs"
        self.quick = (*QUICK, f"data.cache_dir={cache}")
        # short: a socket's path has at most 107 characters
        self.ray_dir = Path(tempfile.mkdtemp(prefix="tp-", dir="/tmp"))
        self.orders = self.ray_dir / "orders.json"  # hook/sitecustomize.py
        self.env = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("RAY_", "HYDRA_", "HF_", "PYTEST_", "COLUMNS"))
        }
        self.env |= {
            "RAY_TMPDIR": str(self.ray_dir),
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONDONTWRITEBYTECODE": "1",
            "RAY_worker_niceness": "0",  # 15 by default: beside other work they would stand still
        }
        self.started: list[Running] = []

    def start(
        self,
        *overrides: str,
        env: dict[str, str] | None = None,
        orders: dict[str, Any] | None = None,
    ) -> Running:
        """Start `python launch.py` with the quick settings and these overrides, which win."""
        env = {**self.env, **(env or {})}
        if orders is not None:
            self.orders.write_text(json.dumps(orders))
            env |= self.hook_env
        saved = "--config-path" in overrides
        return self.execute(
            [sys.executable, str(ROOT / "launch.py"), *(() if saved else self.quick), *overrides],
            env,
        )

    def run(
        self,
        *overrides: str,
        env: dict[str, str] | None = None,
        orders: dict[str, Any] | None = None,
    ) -> Ended:
        return self.start(*overrides, env=env, orders=orders).wait()

    def execute(self, command: list[str], env: dict[str, str] | None = None) -> Running:
        self.started.append(Running(command, self.cwd, env or self.env, self.processes))
        return self.started[-1]

    @property
    def hook_env(self) -> dict[str, str]:
        return {"PYTHONPATH": str(Path(__file__).parent / "hook"), "TP_TEST_HOOK": str(self.orders)}

    def sessions(self) -> list[Path]:
        """The directories of the Rays that were started, each with its logs."""
        return sorted((self.ray_dir / "ray").glob("session_2*"))

    def processes(self) -> dict[int, str]:
        """Every process of these Rays, with its title: each writes its log below our directory."""
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with suppress(OSError):
                    title = (
                        (entry / "cmdline")
                        .read_bytes()
                        .replace(b"\0", b" ")
                        .decode(errors="replace")
                        .strip()
                    )
                    if title and any(
                        str(self.ray_dir) in os.readlink(entry / "fd" / str(number))
                        for number in (1, 2)
                    ):
                        found[int(entry.name)] = title
        return found

    def workers(self) -> list[int]:
        return sorted(pid for pid, title in self.processes().items() if "RayTrainWorker" in title)

    def until(self, condition: Callable[[], Any], running: Running | None = None) -> None:
        """Wait until a condition holds. It fails once nothing is at work that could bring it."""
        still = running.stillness() if running else Stillness(self.processes, *HANGS)
        while not condition():
            if running is not None and running.process.poll() is not None:
                pytest.fail(f"ended early: {running.wait()}")
            assert not still(), f"stands still, {still}; processes: {self.processes()}"
            time.sleep(0.05)

    def close(self) -> None:
        for each in self.started:
            each.kill()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(AssertionError):
            self.until(lambda: not self.processes())
        shutil.rmtree(self.ray_dir, ignore_errors=True)


def rows_of(run: Path, saves: bool = False) -> list[dict[str, Any]]:
    """metrics.jsonl's steps and evaluations, or its saves; while it is being written, without the
    line that isn't whole yet.
    """
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if ("checkpoint_seconds" in row) == saves]


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """The logged training steps. Of a step that was done again the last one counts."""
    return {row["step"]: row for row in rows_of(run) if "loss" in row}


def summary_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return values


def the_run(storage: Path) -> Path:
    """The one run's directory in a storage path."""
    (run,) = [path for path in storage.iterdir() if path.is_dir()]
    return run


@dataclass
class Reference:
    """A run from start to end that nobody disturbed."""

    ended: Ended
    run: Path
    overrides: tuple[str, ...]
    launcher: Launcher


def copy_run(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
