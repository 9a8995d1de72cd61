"""One writer: the owner of a run's directory, by a lock that a killed owner can't leave behind.

    <run>/owner.json    host, pid, when it began, launch, a heartbeat, renewed every BEAT seconds

An owner on this machine is dead when its process is; one on another machine when its heartbeat is
older than DEAD seconds and doesn't move while it is watched (clocks may differ). On local and
shared directories a claim reads and writes under a file lock, so that of two that claim at once one
wins; where there is none (object stores), each writes, waits and reads back: the last one written
wins.

Whoever loses the directory (a machine that slept, whose lock was taken over) learns it from the
next heartbeat, and its workers before they publish a checkpoint: `owned_by`.
"""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tp_trainer.checkpoint.store import Store
from tp_trainer.config import ConfigError

OWNER, LOCK = "owner.json", ".owner.lock"
BEAT = 5.0  # seconds between heartbeats
DEAD = 60.0  # seconds without one after which an owner on another machine may be dead
WATCH = 3 * BEAT  # seconds for which its heartbeat must then stand still
RELEASE_SECONDS = 30.0  # that a heartbeat under way may hold the end
SETTLE = 1.0  # seconds from writing to reading back, where nothing can be locked


def owned_by(store: Store, launch: str) -> bool:
    """Whether the run's directory belongs to this start of the program: what else writes there must
    not publish.
    """
    return (_read(store) or {}).get("launch") == launch


def _read(store: Store) -> dict[str, Any] | None:
    """The record of the owner that there is. Raises where that can't be said: an error is no
    absence."""
    try:
        owner = json.loads(store.read(OWNER))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


class Owner:
    """This process as the owner of a run's directory, from `claim` to `release`.

    Attributes:
        launch: the name of this start of the program.
        taken_over: a sentence about the dead owner that left its lock, or None.
        lost: set once the directory belongs to somebody else.
    """

    def __init__(self, store: Store, launch: str) -> None:
        self.store, self.launch = store, launch
        self.taken_over: str | None = None
        self.lost, self.released = threading.Event(), threading.Event()
        self.record: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": _machine(),
            "started": _started(os.getpid()),
            "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            "launch": launch,
        }
        self.thread = threading.Thread(target=self._beat, name="owner", daemon=True)

    def claim(self, key: str, value: str) -> None:
        """Take the directory, from nobody or from a dead owner.

        Raises:
            ConfigError: it has an owner that lives, or can't be read. `key` and `value` are what
            the user gave that led there.
        """
        try:
            self._claim(key, value)
        except ConfigError:
            raise
        except Exception as error:  # every storage has its own
            raise ConfigError(
                "checkpoint.storage_path", self.store.run_dir, f"can't be claimed ({error})"
            ) from error
        self.thread.start()

    def _claim(self, key: str, value: str) -> None:
        other = _read(self.store)
        silent = other is not None and _maybe_dead(other) and self._stands_still(other)
        with _locked(self.store) as locked:
            now = _read(self.store)
            if now is not None:
                if not (_dead(now) or (silent and now == other)):
                    raise ConfigError(
                        key,
                        value,
                        f"is being trained by {_named(now)}; stop that one, or give another {key}",
                    )
                self.taken_over = f"taking over from {_named(now)}, which is gone"
            self._write()
        if not locked:
            time.sleep(SETTLE)
            if not owned_by(self.store, self.launch):
                raise ConfigError(
                    key,
                    value,
                    f"is being trained by {_named(_read(self.store) or {})}; give another {key}",
                )

    def release(self) -> None:
        """Leave the directory to whoever comes next."""
        self.released.set()
        self.thread.join(RELEASE_SECONDS)
        with (
            suppress(Exception),
            _locked(self.store),
        ):  # whoever comes next finds that this process is gone
            if owned_by(self.store, self.launch):
                self.store.remove(OWNER)

    def _stands_still(self, other: dict[str, Any]) -> bool:
        """Whether another owner's record stays as it is for WATCH seconds."""
        until = time.monotonic() + WATCH
        while time.monotonic() < until:
            time.sleep(min(1.0, WATCH))
            if _read(self.store) != other:
                return False
        return True

    def _beat(self) -> None:
        while not self.released.wait(BEAT):
            # a full disk, a server that is away: the next one may go through
            with suppress(Exception), _locked(self.store):
                if not owned_by(self.store, self.launch):
                    self.lost.set()
                    return
                self._write()

    def _write(self) -> None:
        text = json.dumps({**self.record, "heartbeat": time.time()}, indent=2) + "\n"
        if self.store.local:  # not Store.write_text: its temporary name is every writer's
            target = Path(self.store.root, OWNER)
            part = target.with_name(f".owner-{self.launch}")
            part.write_text(text, encoding="utf-8")
            os.replace(part, target)
        else:
            self.store.write_text(OWNER, text)


@contextmanager
def _locked(store: Store) -> Iterator[bool]:
    """Alone among the processes that see this directory. Gives False where there is nothing to
    lock.
    """
    if not store.local:
        yield False
        return
    os.makedirs(store.root, exist_ok=True)
    with open(f"{store.root}/{LOCK}", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield False
            return
        yield True


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"


def _dead(owner: dict[str, Any]) -> bool:
    """Surely dead: its process was one of this machine's, and is no more."""
    return owner.get("machine") == _machine() is not None and _started(
        int(owner["pid"])
    ) != owner.get("started")


def _maybe_dead(owner: dict[str, Any]) -> bool:
    """Of another machine (or this one can't tell), and silent for long."""
    return (
        owner.get("machine") is None or owner.get("machine") != _machine()
    ) and time.time() - float(owner.get("heartbeat", 0)) > DEAD


def _machine() -> str | None:
    """What tells this machine, since it was last started, and these process numbers from others;
    host names needn't.
    """
    with suppress(OSError):
        return (
            f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()}"
            f" {os.readlink('/proc/self/ns/pid')}"
        )
    return None


def _started(pid: int) -> str | None:
    """When a process of this machine began, in clock ticks; None: there is none, or a zombie."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None
