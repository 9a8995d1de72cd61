"""A run's directory as files, on whatever storage it lies: small files read and written as wholes,
large ones block by block. No torch.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import xxhash
from fsspec.core import url_to_fs
from omegaconf import OmegaConf
from yaml import YAMLError

from tp_trainer.checkpoint.manifest import Damaged, Entry
from tp_trainer.checkpoint.requests import again, count_failures, options

NOT_OFFERED = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EBADF,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
}
"""What CIFS, FUSE and others answer where a directory should be opened or synced; never EIO."""


class Sink:
    """A new file, written block by block. Its size and checksum are of the bytes in memory, not of
    those read back.
    """

    def __init__(self, directory: RunDirectory, path: str) -> None:
        self.local = directory.local
        # never through a link, never into a file that is there
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        self.file: Any = (
            os.fdopen(os.open(path, flags, 0o666), "wb", buffering=0)
            if self.local
            else directory.fs.open(path, "wb")
        )
        self.hash, self.bytes = xxhash.xxh3_128(), 0

    def write(self, block: Any) -> None:
        """A bytes-like object. Raises OSError, on object stores whatever their client raises."""
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


class RunDirectory:
    """A run's directory (a path or an fsspec URL), whatever it holds."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir.rstrip("/")
        self.fs, root = url_to_fs(self.run_dir, **options(self.run_dir))
        self.root = str(root).rstrip("/")
        # files can be renamed, linked and brought to the disk
        self.local = "file" in self.fs.protocol
        self._told = False  # that its directories can't be brought to the disk

    def read_json(self, name: str) -> Any | None:
        """The content of a JSON file in the run's directory; None where there is none or it is no
        JSON.
        """
        try:
            return json.loads(self.read(name))
        except (OSError, ValueError, RecursionError):
            return None

    def read_yaml(self, name: str) -> Mapping[str, Any] | None:
        """The content of a YAML file in the run's directory, interpolations as they stand.

        None where there is none.

        Raises:
            ValueError: there is one, and it can't be read or has no keys. One line.
        """

        try:
            # asked for again where the storage fails; what it holds stays as it is
            text = again(self.fs, lambda: self.fs.cat_file(f"{self.root}/{name}"))
            content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text.decode())))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, YAMLError) as error:
            raise ValueError(" ".join(str(error).split())[:200]) from error
        if not isinstance(content, dict) or not content:
            raise ValueError("it has no keys")
        return {str(key): value for key, value in content.items()}

    def write_text(self, name: str, text: str) -> None:
        """Write a small file as a whole: readers see the old one or the new one."""
        again(self.fs, lambda: self._write_text(name, text))

    def _write_text(self, name: str, text: str) -> None:
        target = f"{self.root}/{name}"
        self.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        if self.local:
            with self.fs.open(target + ".part", "w", encoding="utf-8") as file:
                file.write(text)
            self.fs.mv(target + ".part", target)
        else:  # an object store shows an object once it is whole
            with self.fs.open(target, "w", encoding="utf-8") as file:
                file.write(text)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def exists(self, name: str) -> bool:
        """Whether there is such a file or directory. Raises where that can't be said, as fsspec's
        `exists` doesn't."""
        try:
            again(self.fs, lambda: self.fs.info(f"{self.root}/{name}"))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def remove(self, name: str) -> None:
        """Remove a file or a directory, if it is there. Of a link only itself goes."""
        path = f"{self.root}/{name}"
        if not self.local:
            with suppress(FileNotFoundError):
                again(self.fs, lambda: self.fs.rm(path, recursive=True))
        elif os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        elif os.path.lexists(path):
            os.unlink(path)

    def remove_all(self, pattern: str) -> None:
        """Remove the files of the run's directory that match a pattern of file names."""
        for name in fnmatch.filter(self.names(), pattern):
            self.remove(name)

    def names(self) -> list[str]:
        """The names in the directory; none where it isn't there. Raises where it can't be told."""

        def listed() -> list[Any]:
            return list(
                os.listdir(self.root) if self.local else self.fs.ls(self.root, detail=False)
            )

        try:
            paths = again(self.fs, listed)
        except (FileNotFoundError, NotADirectoryError):
            if self.local and os.path.lexists(self.root):  # a file, or a link to nowhere
                raise
            return []
        return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in paths]

    def open(self, name: str) -> Any:
        """A file to read, as bytes. A link is not followed."""
        path = f"{self.root}/{name}"
        return (
            os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0)
            if self.local
            else self.fs.open(path, "rb")
        )

    def read(self, name: str) -> bytes:
        """A small file's content. Raises OSError."""

        def look() -> bytes:
            with self.open(name) as file:
                return bytes(file.read())

        return again(self.fs, look)

    def create(self, name: str) -> Sink:
        """A new file to write, as bytes."""
        count_failures(self.fs)
        path = f"{self.root}/{name}"
        if self.local:  # a network file system may show late that another process has made it
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return Sink(self, path)

    def sizes(self, name: str) -> dict[str, int]:
        """The sizes in bytes of the files of a directory in it; -1 for what is no plain file.

        Empty where there is no such directory. Raises Damaged where it is a link or a file.
        """
        path = f"{self.root}/{name}"
        if not self.local:
            try:
                listing = again(self.fs, lambda: self.fs.ls(path, detail=True))
            except FileNotFoundError:
                return {}
            return {
                str(each["name"]).rsplit("/", 1)[-1]: (
                    int(each["size"]) if each["type"] == "file" else -1
                )
                for each in listing
            }
        if os.path.islink(path):
            raise Damaged("it is a symbolic link; the directory itself is wanted")
        if not os.path.lexists(path):
            return {}
        if not os.path.isdir(path):
            raise Damaged("it is a file, not a directory")
        with os.scandir(path) as entries:
            status = {each.name: each.stat(follow_symlinks=False) for each in entries}
        return {
            file: each.st_size if stat.S_ISREG(each.st_mode) else -1
            for file, each in status.items()
        }

    def sync_names(self, name: str, warn: Callable[[str], None]) -> None:
        """Bring the names in a directory to the disk; "" is the run's own.

        Some file systems don't offer that, and order the names themselves: `warn` hears of it once.

        Raises:
            OSError: it failed for another reason.
        """
        path = f"{self.root}/{name}".rstrip("/")
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            if error.errno not in NOT_OFFERED:
                raise
            if not self._told:
                warn(
                    f"the file system of {self.root} doesn't sync directories ({error.strerror}): "
                    "after a power failure the newest checkpoint may be absent"
                )
            self._told = True

    def try_remove(self, name: str, warn: Callable[[str], None], first: str | None = None) -> None:
        """Remove, its file `first` before the others. Where that fails, `warn` hears of it."""
        try:
            if first and not (self.local and os.path.islink(f"{self.root}/{name}")):
                self.remove(f"{name}/{first}")
            self.remove(name)
        except Exception as error:  # every file system has its own
            warn(f"{name} can't be removed ({error})")
