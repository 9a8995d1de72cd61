"""Checkpoints as files: found, verified, made and deleted without torch, on the driver and on workers.

    <run>/step_00000100/   00000_0000.distcp ...  tensors, written by every rank (checkpoint/files.py)
                           metadata.json          which tensor lies where in them
                           state.json             step, position in the data, batch size, layout
                           manifest.json          written last: every file's size and checksum, and its own

A checkpoint counts when its manifest is whole and every file is as it says. Nothing existing is written into. Where files
can be renamed (a local or shared directory) a checkpoint is built in a hidden directory beside and appears by one rename;
on an object store it appears with its manifest. All here is JSON and bytes: nothing that is read can run.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import xxhash
from fsspec.core import url_to_fs
from omegaconf import OmegaConf
from yaml import YAMLError

from tp_trainer.checkpoint.manifest import MANIFEST, METADATA, STATE, Damaged, Entry, parse_manifest, parse_state, render, render_manifest

NAME = re.compile(r"step_([0-9]{8,18})")
DRAFT, OLD = ".saving-", ".damaged-"  # directories that are no checkpoints yet, and no longer
BLOCK_BYTES = 4 << 20
VERIFY_THREADS = 4


@dataclass(frozen=True)
class Found:
    """A checkpoint that counts."""

    step: int
    path: str  # with the scheme that its directory was given with
    state: dict[str, Any]
    files: dict[str, Entry] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def store(self) -> Store:
        return Store(self.path.rpartition("/")[0])


def launch_file(launch: str) -> str:
    """The file that the driver writes into the run's directory and by which workers know that they see the same storage."""
    return f".launch-{launch}"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


class Sink:
    """A new file, written block by block. Its size and checksum are of the bytes in memory, not of those read back."""

    def __init__(self, store: Store, path: str) -> None:
        self.local = store.local
        # never through a link, never into a file that is there
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self.file: Any = os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0) if self.local else store.fs.open(path, "wb")
        self.hash, self.bytes = xxhash.xxh3_128(), 0

    def write(self, block: Any) -> None:
        """A bytes-like object. Raises OSError, and on object stores whatever their client raises."""
        view = memoryview(block)
        self.hash.update(view)
        self.bytes += view.nbytes
        if not self.local:
            self.file.write(view)
            return
        while view.nbytes:
            view = view[self.file.write(view) :]

    def close(self) -> Entry:
        """Bring it to the disk."""
        if self.local:
            os.fsync(self.file.fileno())
        self.file.close()
        return Entry(self.bytes, self.hash.hexdigest())

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            with suppress(Exception):  # the first error is the one that matters
                self.file.close()


class Store:
    """The checkpoints of one run's directory (a path or an fsspec URL)."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir.rstrip("/")
        self.fs, root = url_to_fs(self.run_dir)
        self.root = str(root).rstrip("/")
        self.local = "file" in self.fs.protocol  # files can be renamed, linked and brought to the disk

    def read_json(self, name: str) -> Any | None:
        """The content of a JSON file in the run's directory; None where there is none or it is no JSON."""
        try:
            return json.loads(self.read(name))
        except (OSError, ValueError, RecursionError):
            return None

    def read_yaml(self, name: str) -> dict[str, Any] | None:
        """The content of a YAML file in the run's directory, interpolations as they stand; None where there is none."""
        try:
            with self.fs.open(f"{self.root}/{name}", "r") as file:
                content = OmegaConf.to_container(OmegaConf.load(file))
        except (OSError, ValueError, YAMLError):
            return None
        return {str(key): value for key, value in content.items()} if isinstance(content, dict) else None

    def write_text(self, name: str, text: str) -> None:
        """Write a small file as a whole: readers see the old one or the new one."""
        target = f"{self.root}/{name}"
        self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        if self.local:
            with self.fs.open(target + ".part", "w") as file:
                file.write(text)
            self.fs.mv(target + ".part", target)
        else:  # an object store shows an object once it is whole
            with self.fs.open(target, "w") as file:
                file.write(text)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def exists(self, name: str) -> bool:
        self.fs.invalidate_cache()
        return bool(self.fs.exists(f"{self.root}/{name}"))

    def remove(self, name: str) -> None:
        """Remove a file or a directory, if it is there. Of a link only itself goes."""
        path = f"{self.root}/{name}"
        if not self.local:
            if self.exists(name):
                self.fs.rm(path, recursive=True)
        elif os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)

    def remove_all(self, pattern: str) -> None:
        """Remove the files of the run's directory that match a pattern of file names."""
        self.fs.invalidate_cache()
        for path in self.fs.glob(f"{self.root}/{pattern}"):
            self.fs.rm(path)

    def _names(self) -> list[str]:
        self.fs.invalidate_cache()
        if not self.fs.exists(self.root):
            return []
        return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False)]

    def step_names(self) -> list[str]:
        """Every directory that is named like a checkpoint, oldest first."""
        return sorted((n for n in self._names() if (match := NAME.fullmatch(n)) and n == step_name(int(match[1]))), key=_number)

    # -------------------------------------------------------------------------------------------------------- reading

    def open(self, name: str) -> Any:
        """A file to read, as bytes. A link is not followed."""
        path = f"{self.root}/{name}"
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) if self.local else self.fs.open(path, "rb")

    def read(self, name: str) -> bytes:
        """A small file's content. Raises OSError."""
        with self.open(name) as file:
            return bytes(file.read())

    def check(self, name: str) -> Found | str:
        """The checkpoint of this name, or why it doesn't count. Looks at all sizes, reads but the small files.

        What it returns has not been verified: `damage` does that.
        """
        number = NAME.fullmatch(name)
        if number is None or name != step_name(int(number[1])):
            return "is no checkpoint: its name is not step_<number>"
        try:
            sizes = self._sizes(name)
            if MANIFEST not in sizes:
                return "unfinished: it has no manifest"
            files = parse_manifest(self.read(f"{name}/{MANIFEST}"), int(number[1]))
            for file, entry in files.items():
                size = sizes.get(file, -1)
                if size < 0:
                    raise Damaged(f"{file} is missing" if file not in sizes else f"{file} is no plain file")
                if size != entry.bytes:
                    raise Damaged(f"{file} has {size} bytes, not {entry.bytes}")
            content = self.read(f"{name}/{STATE}")
            if Entry(len(content), xxhash.xxh3_128_hexdigest(content)) != files[STATE]:
                raise Damaged(f"{STATE} has another checksum")
            state = parse_state(content, int(number[1]))
        except Damaged as error:
            return f"damaged: {error}"
        except OSError as error:
            return f"damaged: can't be read ({error})"
        return Found(int(number[1]), f"{self.run_dir}/{name}", state, files)

    def _sizes(self, name: str) -> dict[str, int]:
        """The files of a checkpoint's directory; -1 for what is none. Empty where there is no such directory."""
        path = f"{self.root}/{name}"
        if not self.local:
            self.fs.invalidate_cache()
            try:
                listing = self.fs.ls(path, detail=True)
            except FileNotFoundError:
                return {}
            return {str(each["name"]).rsplit("/", 1)[-1]: int(each["size"]) if each["type"] == "file" else -1 for each in listing}
        if os.path.islink(path):
            raise Damaged("it is a symbolic link; the directory itself is wanted")
        if not os.path.isdir(path):
            return {}
        with os.scandir(path) as entries:
            status = {each.name: each.stat(follow_symlinks=False) for each in entries}
        return {file: each.st_size if stat.S_ISREG(each.st_mode) else -1 for file, each in status.items()}

    def newest(self) -> tuple[Found | None, list[str]]:
        """The newest checkpoint that counts and what was passed over: `name (why)`."""
        skipped: list[str] = []
        for name in reversed(self.step_names()):
            found = self.check(name)
            if isinstance(found, Found):
                return found, skipped
            skipped.append(f"{name} ({found})")
        return None, skipped

    def damage(self, found: Found, files: Iterable[str]) -> str | None:
        """Read some of a checkpoint's files through, in threads: the first that isn't what was written, or None."""

        def look(file: str) -> str | None:
            digest, size = xxhash.xxh3_128(), 0
            try:
                with self.open(f"{found.name}/{file}") as source:
                    while block := source.read(BLOCK_BYTES):
                        digest.update(block)
                        size += len(block)
            except OSError as error:
                return f"damaged: {file} can't be read ({error})"
            same = Entry(size, digest.hexdigest()) == found.files[file]
            return None if same else f"damaged: {file} has another checksum"

        with ThreadPoolExecutor(VERIFY_THREADS) as pool:
            return next((reason for reason in pool.map(look, files) if reason), None)

    # -------------------------------------------------------------------------------------------------------- writing

    def begin(self, step: int, replace: bool = False, warn: Callable[[str], None] = lambda text: None) -> str:
        """A new, empty directory for a checkpoint's files; returns its name. Called by one process, before any writes.

        Asserts that no whole one of that step is there. What dead saves left is removed; where that fails, `warn` hears of it.

        Args:
            replace: one may be there that only looks whole: it was read through and is damaged.

        Raises:
            OSError: the directory can't be made.
        """
        name = step_name(step)
        assert replace or not isinstance(self.check(name), Found), f"{name} is there already"
        if not self.local:
            self.remove(name)  # never whole: nothing to lose
            return name
        for left in [each for each in self._names() if each.startswith((DRAFT, OLD))]:
            self._try_remove(left, warn)
        draft = f"{DRAFT}{name}-{uuid.uuid4().hex[:8]}"
        os.makedirs(f"{self.root}/{draft}")
        return draft

    def write(self, draft: str, file: str) -> Sink:
        """A new file of a checkpoint that `begin` began, to be written by any process."""
        if self.local:
            os.makedirs(f"{self.root}/{draft}", exist_ok=True)  # a network file system may show it late
        return Sink(self, f"{self.root}/{draft}/{file}")

    def commit(
        self,
        draft: str,
        step: int,
        state: Mapping[str, Any],
        metadata: Mapping[str, Any],
        files: Mapping[str, Entry],
        replace: bool = False,
    ) -> str:
        """Make the checkpoint count: the small files, the manifest over all, and one step by which it appears. Returns its path.

        Args:
            files: what all processes wrote.
            replace: as given to `begin`.

        Raises:
            OSError: it doesn't count.
        """
        entries = dict(files)
        for file, content in ((METADATA, render(metadata)), (STATE, render(state))):
            with self.write(draft, file) as sink:
                sink.write(content)
                entries[file] = sink.close()
        with self.write(draft, MANIFEST) as sink:
            sink.write(render_manifest(step, entries))
            sink.close()
        name = step_name(step)
        if self.local:
            target = f"{self.root}/{name}"
            _sync_directory(f"{self.root}/{draft}")
            if os.path.lexists(target):
                if not replace and isinstance(self.check(name), Found):
                    raise FileExistsError(f"{name} has come meanwhile")
                os.rename(target, f"{self.root}/{draft.replace(DRAFT, OLD)}")
            os.rename(f"{self.root}/{draft}", target)
            _sync_directory(self.root)
            with suppress(OSError):
                self.remove(draft.replace(DRAFT, OLD))
        return f"{self.run_dir}/{name}"

    def discard(self, draft: str) -> None:
        """Remove what a failed save has written, as far as that goes."""
        with suppress(Exception):
            self.remove(draft)

    def keep(
        self,
        last: int,
        every: int | None = None,
        best: int = 0,
        damaged: Collection[str] = (),
        sure: str | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Delete checkpoints that nothing keeps, and unfinished ones that are older than one that counts.

        Kept are the newest `last`, those whose step is divisible by `every`, and the `best` with the lowest validation loss (of
        equal ones the oldest: a loss is measured at or before its checkpoint). Where deleting fails, `warn` hears of it.

        Args:
            damaged: names that were found damaged; they keep nothing.
            sure: a name that stays whatever the rules say: the one just written.
        """
        names = self.step_names()
        whole = [found for name in names if name not in damaged and isinstance(found := self.check(name), Found)]
        if not whole:
            return
        losses = [(loss, found.step, found.name) for found in whole if _is_number(loss := found.state.get("validation_loss"))]
        newest = [found.name for found in whole[-last:]]
        kept = {*newest, *(name for _, _, name in sorted(losses)[:best]), *([sure] if sure else [])}
        kept |= {found.name for found in whole if every and found.step % every == 0}
        counting = {found.name for found in whole}
        for name in names:
            unfinished = name not in counting and _number(name) < whole[-1].step and not self.exists(f"{name}/{MANIFEST}")
            old = len(newest) == last and _number(name) < _number(newest[0])  # damaged ones among them
            if name not in kept and (unfinished or old or name in counting):
                self._try_remove(name, warn, first=MANIFEST)

    def _try_remove(self, name: str, warn: Callable[[str], None], first: str | None = None) -> None:
        """Remove, its file `first` before the others (a checkpoint that is half deleted must not count)."""
        try:
            if first and not (self.local and os.path.islink(f"{self.root}/{name}")):
                self.remove(f"{name}/{first}")
            self.remove(name)
        except Exception as error:  # every file system has its own
            warn(f"{name} can't be removed ({error})")


def at(path: str) -> Found | str:
    """The checkpoint at a full path, or why it doesn't count."""
    directory, _, name = path.rstrip("/").rpartition("/")
    if not NAME.fullmatch(name):
        return "is no checkpoint: its name is not step_<number>"
    return Store(directory).check(name)


def _number(name: str) -> int:
    return int(name[5:])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _sync_directory(path: str) -> None:
    """Bring a directory's names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
