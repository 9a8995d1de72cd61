"""Checkpoints as files: found, verified, made and deleted without torch, on the driver and on
workers.

    <run>/step_00000100/   00000_0000.distcp ...  tensors, by every rank (checkpoint/files.py)
                           metadata.json          which tensor lies where in them
                           state.json             step, position in the data, batch size, layout
                           manifest.json          last: every file's size and checksum, and its own

A checkpoint counts when its manifest is whole and every file is as it says. Nothing existing is
written into. Where files can be renamed (a local or shared directory) a checkpoint is built in a
hidden directory beside and appears by one rename; on an object store it appears with its manifest.
All here is JSON and bytes: nothing that is read can run.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import xxhash

from tp_trainer.checkpoint.directory import RunDirectory
from tp_trainer.checkpoint.manifest import (
    MANIFEST,
    METADATA,
    STATE,
    Damaged,
    Entry,
    parse_manifest,
    render_manifest,
)
from tp_trainer.checkpoint.requests import again
from tp_trainer.checkpoint.state import RunState
from tp_trainer.config import ConfigError
from tp_trainer.config.quoting import pasted

NAME = re.compile(r"step_([0-9]{8,18})")
DRAFT, OLD = ".saving-", ".damaged-"  # directories that are no checkpoints yet, and no longer
UNFINISHED = "unfinished: it has no manifest"
ABSENT = "is not there"
BLOCK_BYTES = 4 << 20
VERIFY_THREADS = 4


class Unknown(str):
    """Why nothing is known of a checkpoint: it couldn't be looked at. It may be whole."""


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint that counts: its manifest is whole and all sizes are as it says."""

    step: int
    path: str  # with the scheme that its directory was given with
    state: RunState
    files: dict[str, Entry] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def store(self) -> Store:
        return Store(self.path.rpartition("/")[0])


def launch_file(launch: str) -> str:
    """The file that the driver writes into the run's directory and by which workers know that they
    see the same storage.
    """
    return f".launch-{launch}"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


class Store(RunDirectory):
    """The checkpoints in a run's directory (a path or an fsspec URL)."""

    def step_names(self) -> list[str]:
        """Every directory that is named like a checkpoint, oldest first."""
        return sorted(filter(is_step, self.names()), key=step_number)

    def strays(self) -> list[str]:
        """Checkpoints that nobody looks for, as `name (why)`: step_100, step_00000100.bak."""
        names = [each for each in sorted(self.names()) if each.startswith("step_")]
        strays = [each for each in names if not is_step(each) and self.exists(f"{each}/{MANIFEST}")]
        return [f"{name} (its name is not step_ and eight digits)" for name in strays]

    def leftovers(self) -> list[str]:
        """Names of what a run has left here that a new one must not touch."""
        begins = ("step_", DRAFT, OLD, "metrics.jsonl", "summary.json")
        return [name for name in self.names() if name.startswith(begins)]

    # ----------------------------------------------------------------------------------------------

    def check(self, name: str) -> VerifiedCheckpoint | str:
        """The checkpoint of this name, or why it doesn't count. Looks at all sizes, reads but the
        small files.

        What it returns has not been verified: `damage` does that. Unknown, where it can't be looked
        at.
        """
        if not is_step(name):
            return "is no checkpoint: its name is not step_<number>"
        step = step_number(name)
        try:
            sizes = self.sizes(name)
            if not sizes and not (self.local and os.path.lexists(f"{self.root}/{name}")):
                return ABSENT
            if MANIFEST not in sizes:
                return UNFINISHED
            files = parse_manifest(self.read(f"{name}/{MANIFEST}"), step)
            for file, entry in files.items():
                size = sizes.get(file, -1)
                if size < 0:
                    raise Damaged(
                        f"{file} is missing" if file not in sizes else f"{file} is no plain file"
                    )
                if size != entry.bytes:
                    raise Damaged(f"{file} has {size} bytes, not {entry.bytes}")
            content = self.read(f"{name}/{STATE}")
            if Entry(len(content), xxhash.xxh3_128_hexdigest(content)) != files[STATE]:
                raise Damaged(f"{STATE} has another checksum")
            state = RunState.parse(content, step)
        except Damaged as error:
            return f"damaged: {error}"
        except Exception as error:  # every storage has its own
            return _unknown("it", error)
        return VerifiedCheckpoint(step, f"{self.run_dir}/{name}", state, files)

    def newest(self) -> tuple[VerifiedCheckpoint | None, list[str]]:
        """The newest checkpoint that counts and what was passed over: `name (why)`."""
        skipped: list[str] = []
        for name in reversed(self.step_names()):
            found = self.check(name)
            if isinstance(found, VerifiedCheckpoint):
                return found, skipped
            skipped.append(f"{name} ({found})")
        return None, skipped

    def damage(self, found: VerifiedCheckpoint, files: Iterable[str]) -> str | None:
        """Read some of a checkpoint's files through, in threads.

        Returns the first that isn't what was written (Unknown: that can't be read), or None.
        """

        def read(file: str) -> Entry:
            digest, size = xxhash.xxh3_128(), 0
            with self.open(f"{found.name}/{file}") as source:
                while block := source.read(BLOCK_BYTES):
                    digest.update(block)
                    size += len(block)
            return Entry(size, digest.hexdigest())

        def look(file: str) -> str | None:
            try:
                same = again(self.fs, lambda: read(file)) == found.files[file]
            except FileNotFoundError:
                return f"damaged: {file} is missing"
            except Exception as error:
                return _unknown(file, error)
            return None if same else f"damaged: {file} has another checksum"

        with ThreadPoolExecutor(VERIFY_THREADS) as pool:
            return next((reason for reason in pool.map(look, files) if reason), None)

    # ----------------------------------------------------------------------------------------------

    def begin(
        self, step: int, replace: bool = False, warn: Callable[[str], None] = lambda text: None
    ) -> str:
        """A new, empty directory for a checkpoint's files; returns its name. Called by one process,
        before any writes.

        Asserts that no whole one of that step is there. What dead saves left is removed; where that
        fails, `warn` hears of it.

        Args:
            replace: one may be there that only looks whole: it was read through and is damaged.

        Raises:
            OSError: the directory can't be made, or what is there can't be looked at.
        """
        name = step_name(step)
        there = self.check(name)
        if isinstance(there, Unknown):
            raise OSError(f"{name} may be there already: {there}")
        assert replace or not isinstance(there, VerifiedCheckpoint), f"{name} is there already"
        if not self.local:
            self.remove(name)  # never whole: nothing to lose
            return name
        for left in [each for each in self.names() if each.startswith((DRAFT, OLD))]:
            self.try_remove(left, warn)
        draft = f"{DRAFT}{name}-{uuid.uuid4().hex[:8]}"
        os.makedirs(f"{self.root}/{draft}")
        return draft

    def commit(
        self,
        draft: str,
        state: RunState,
        metadata: bytes,
        files: Mapping[str, Entry],
        replace: bool = False,
        warn: Callable[[str], None] = lambda text: None,
    ) -> str:
        """Make the checkpoint count: the small files, the manifest over all, and one step by which
        it appears. Returns its path.

        Args:
            metadata: the content of metadata.json.
            files: what all processes wrote.
            replace: as given to `begin`.
            warn: hears, once, of a file system that doesn't sync directories.

        Raises:
            OSError: it doesn't count.
        """
        entries = dict(files)
        for file, content in ((METADATA, metadata), (STATE, state.render())):
            entries[file] = self._put(draft, file, content)
        self._put(draft, MANIFEST, render_manifest(state.step, entries))
        name = step_name(state.step)
        if self.local:
            target = f"{self.root}/{name}"
            self.sync_names(draft, warn)
            if os.path.lexists(target):
                if not replace and isinstance(self.check(name), VerifiedCheckpoint):
                    raise FileExistsError(f"{name} has come meanwhile")
                os.rename(target, f"{self.root}/{draft.replace(DRAFT, OLD)}")
            os.rename(f"{self.root}/{draft}", target)
            self.sync_names("", warn)
            with suppress(OSError):
                self.remove(draft.replace(DRAFT, OLD))
        return f"{self.run_dir}/{name}"

    def _put(self, draft: str, file: str, content: bytes) -> Entry:
        def put() -> Entry:
            with self.create(f"{draft}/{file}") as sink:
                sink.write(content)
                return sink.close()

        return put() if self.local else again(self.fs, put)  # a local one is never written into

    def discard(self, draft: str) -> None:
        """Remove what a failed save has written, as far as that goes."""
        with suppress(Exception):
            self.remove(draft)


def _unknown(what: str, error: Exception) -> Unknown:
    return Unknown(
        f"{what} can't be looked at ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    )


def at(path: str) -> VerifiedCheckpoint | str:
    """The checkpoint at a full path, or why it doesn't count."""
    directory, _, name = path.rstrip("/").rpartition("/")
    return Store(directory).check(name)


def named(key: str, path: str) -> VerifiedCheckpoint:
    """The checkpoint that `key` names by its full path.

    Raises:
        ConfigError: it doesn't count. Where a run's directory was given, or a checkpoint that isn't
            there, with one to type.
    """
    directory, _, name = path.rstrip("/").rpartition("/")
    hint = ""
    try:
        beside, inside = Store(directory), Store(path)
        found = beside.check(name)
        if isinstance(found, VerifiedCheckpoint):
            return found
        if not is_step(name) and not beside.exists(name):
            found = ABSENT
        if found == ABSENT and (newest := beside.newest()[0]):
            hint = f"; the newest there is {pasted(key, newest.path)}"
        elif not is_step(name) and (newest := inside.newest()[0]):
            hint = f"; give one of its checkpoints, e.g. {pasted(key, newest.path)}"
    except Exception as error:  # every file system has its own
        raise ConfigError(key, path, f"can't be read ({error})") from error
    raise ConfigError(key, path, found + hint)


def check_some_count(store: Store, resume: str, passed_over: Iterable[str]) -> None:
    """To be called where no checkpoint counts: raises ConfigError where there are some, though.

    An unfinished one on an object store is none: a save that was killed leaves it. A directory
    appears whole.

    Args:
        passed_over: of each, `name (why)`.
    """
    lost = [each for each in passed_over if store.local or UNFINISHED not in each]
    if lost:
        shown = "; ".join(lost[:5]) + (f"; and {len(lost) - 5} more" if len(lost) > 5 else "")
        scratch = "another experiment_name"
        if store.local:
            scratch = "checkpoint.resume=never, which keeps what is there under another name"
        message = (
            f"{store.run_dir} holds checkpoints, and none of them counts: {shown}; mend one of"
            " them, "
        )
        raise ConfigError(
            "checkpoint.resume", resume, f"{message}or to start from scratch give {scratch}"
        )


def is_step(name: str) -> bool:
    return (match := NAME.fullmatch(name)) is not None and name == step_name(int(match[1]))


def step_number(name: str) -> int:
    return int(name[5:])
