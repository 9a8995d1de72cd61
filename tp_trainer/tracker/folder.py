"""A directory of a run that may lie at a URL: what is written there is written here first."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any


class Folder:
    """`<run_dir>/<name>` itself, or a local directory that `upload` copies there when that is
    remote."""

    def __init__(self, run_dir: str, name: str = "") -> None:
        self.target = "/".join(filter(None, [run_dir.rstrip("/"), name]))
        self.remote = "://" in run_dir
        made = tempfile.mkdtemp(prefix="tp_trainer_") if self.remote else self.target
        self.local = Path(made)
        self.local.mkdir(parents=True, exist_ok=True)

    def fetch(self, name: str) -> None:
        """Start from the remote file of this name, if there is one.

        Raises whatever the storage does where it can't say: taken for absent, the file would be
        written over.
        """
        fs, path = self._filesystem()
        with suppress(FileNotFoundError):  # fsspec's `exists` takes any error for absence
            content = fs.cat_file(f"{path}/{name}")
            (self.local / name).write_bytes(content)

    def upload(self) -> None:
        """Copy every file whole. Object stores can't append, and they replace an object at once: a
        reader sees no half file."""
        if not self.remote:
            return
        fs, path = self._filesystem()
        for file in sorted(p for p in self.local.rglob("*") if p.is_file()):
            target = f"{path}/{file.relative_to(self.local).as_posix()}"
            fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            fs.put_file(str(file), target)

    def remove(self) -> None:
        """Delete the local copy of a remote directory."""
        if self.remote:
            shutil.rmtree(self.local, ignore_errors=True)

    def _filesystem(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(self.target)
        return fs, path.rstrip("/")
