"""What the driver makes of signals, before and while something trains."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2

import pytest

from tp_trainer.driver.signals import ONE_CAUSE, Signals, notices_blocked


@pytest.mark.parametrize(
    ("came", "asked", "code"),
    [
        ([SIGHUP], SIGHUP, None),
        ([SIGUSR1], SIGUSR1, None),
        ([SIGTERM, SIGTERM], SIGTERM, 143),
        ([SIGTERM, SIGINT], SIGTERM, 130),
        ([SIGINT, SIGINT], SIGINT, 130),
        ([SIGUSR1, SIGTERM], SIGUSR1, None),  # Slurm's, then that of the time limit
        ([SIGHUP, SIGTERM, SIGTERM], SIGHUP, 143),
        ([SIGUSR1, SIGTERM, SIGINT], SIGUSR1, 130),
        ([SIGHUP, SIGHUP], SIGHUP, None),  # a terminal's own, and its shell's
        ([SIGHUP, ONE_CAUSE * 2, SIGHUP], SIGHUP, 129),
        ([SIGUSR2, ONE_CAUSE * 2, SIGUSR2], SIGUSR2, 140),
        ([SIGTERM, SIGHUP], SIGTERM, None),  # systemd's
        ([SIGHUP, SIGUSR1], SIGHUP, None),
    ],
)
def test_while_it_trains(
    came: list[float], asked: int, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, ended = 100.0, None
    monkeypatch.setattr(time, "monotonic", lambda: now)
    signals = Signals()
    signals.patient = lambda: True
    for each in came:
        if isinstance(each, float):
            now += each
            continue
        now += 0.01
        try:
            signals(int(each), None)
        except KeyboardInterrupt:
            ended = 130
        except SystemExit as end:
            assert isinstance(end.code, int)
            ended = end.code
    assert (signals.asked, ended) == (asked, code)


@pytest.mark.parametrize("number", [SIGTERM, SIGHUP, SIGUSR1, SIGUSR2])
def test_before_it_trains(number: signal.Signals) -> None:
    with pytest.raises(SystemExit) as end, Signals().heard():
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert end.value.code == 128 + number
    assert signal.getsignal(SIGHUP) == signal.SIG_DFL


def test_what_was_ignored_stays_so() -> None:
    """As under nohup."""
    before = signal.signal(SIGHUP, signal.SIG_IGN)
    try:
        with Signals().heard():
            os.kill(os.getpid(), SIGHUP)
            time.sleep(0.1)
    finally:
        signal.signal(SIGHUP, before)


def test_a_stop_is_known_to_who_hears_afterwards() -> None:
    """The run has ended and Ray is ending: the SIGTERM that follows a notice cuts nothing short."""
    with Signals().heard():
        inner = Signals()
        inner.patient = lambda: True
        with inner.heard():
            os.kill(os.getpid(), SIGUSR1)
            time.sleep(0.05)
        assert inner.asked == SIGUSR1
        os.kill(os.getpid(), SIGTERM)
        time.sleep(0.05)
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), SIGTERM)
            time.sleep(5)


def test_what_is_started_does_not_hear_notices() -> None:
    mask = "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))"
    command = [sys.executable, "-c", mask]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with notices_blocked():
        seen = subprocess.run(command, capture_output=True, text=True).stdout
    assert all(each.name in seen for each in (SIGHUP, SIGUSR1, SIGUSR2)), seen
    assert SIGTERM.name not in seen and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


CLOSED = """
import signal, sys, time
if sys.argv[2] == "not told":  # before libraries start threads
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
from tp_trainer.driver.signals import Signals
from tp_trainer.terminal import outlive
if sys.argv[2] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
outlive()
signals = Signals()
signals.patient = lambda: True
with signals.heard():
    print("ready", flush=True)
    for _ in range(20):
        time.sleep(0.05)
        print("a line", file=sys.stderr)
        print("a line", flush=True)
        signals.look()
open(sys.argv[1], "w").write(str(signals.asked))
"""


@pytest.mark.parametrize(("how", "asked"), [("told", "1"), ("not told", "1"), ("nohup", "None")])
def test_a_terminal_that_is_closed(how: str, asked: str, tmp_path: Path) -> None:
    """Printing to it fails from then on."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", CLOSED, str(tmp_path / "asked"), how])
    seen = b""
    while b"ready" not in seen:
        seen += os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "asked").read_text() == asked
