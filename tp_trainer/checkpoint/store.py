"""Checkpoints as a directory listing: found, read, counted and deleted without torch, on the driver and on workers.

    <run>/step_00000100/   __0_0.distcp ...  .metadata   shards, written by every rank (checkpoint/state.py)
                           state.json                    step, position in the data, batch size, layout
                           manifest.json                 written last, names every file and its size

A checkpoint counts when its manifest is there and every file has the size that it says. Nothing existing is written
into: a directory without a manifest is what an interrupted save left behind, and is removed before a new one begins.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from fsspec.core import url_to_fs
from omegaconf import OmegaConf
from yaml import YAMLError

NAME = re.compile(r"step_(\d{8,})")
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class Found:
    """A checkpoint that counts."""

    step: int
    path: str  # with the scheme that its directory was given with
    state: dict[str, Any]


def launch_file(launch: str) -> str:
    """The file that the driver writes into the run's directory and by which workers know that they see the same storage."""
    return f".launch-{launch}"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


class Store:
    """The checkpoints of one run's directory (a path or an fsspec URL)."""

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir.rstrip("/")
        self.fs, self.root = url_to_fs(self.run_dir)

    def read_json(self, name: str) -> Any | None:
        """The content of a JSON file in the run's directory; None where there is none or it is no JSON."""
        try:
            with self.fs.open(f"{self.root}/{name}", "r") as file:
                return json.load(file)
        except (OSError, ValueError):
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
        if "file" in self.fs.protocol:
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
        if self.exists(name):
            self.fs.rm(f"{self.root}/{name}", recursive=True)

    def remove_all(self, pattern: str) -> None:
        """Remove the files of the run's directory that match a pattern of file names."""
        self.fs.invalidate_cache()
        for path in self.fs.glob(f"{self.root}/{pattern}"):
            self.fs.rm(path)

    def step_names(self) -> list[str]:
        """Every directory that is named like a checkpoint, oldest first."""
        self.fs.invalidate_cache()
        if not self.fs.exists(self.root):
            return []
        names = [str(path).rstrip("/").rsplit("/", 1)[-1] for path in self.fs.ls(self.root, detail=False)]
        return sorted((n for n in names if NAME.fullmatch(n)), key=lambda n: int(n[5:]))

    def check(self, name: str) -> Found | str:
        """The checkpoint of this name, or why it doesn't count."""
        manifest = self.read_json(f"{name}/{MANIFEST}")
        if manifest is None:
            return "unfinished: it has no manifest"
        for file, size in manifest["files"].items():
            path = f"{self.root}/{name}/{file}"
            if not self.fs.exists(path):
                return f"damaged: {file} is missing"
            if self.fs.size(path) != size:
                return f"damaged: {file} has {self.fs.size(path)} bytes, not {size}"
        state = self.read_json(f"{name}/{STATE}")
        return Found(int(state["step"]), f"{self.run_dir}/{name}", state) if state else f"damaged: {STATE} can't be read"

    def newest(self, launch: str | None = None) -> tuple[Found | None, list[str]]:
        """The newest checkpoint that counts (of this launch of the program, if given) and what was passed over: `name (why)`."""
        skipped: list[str] = []
        for name in reversed(self.step_names()):
            found = self.check(name)
            if isinstance(found, str):
                skipped.append(f"{name} ({found})")
            elif launch is None or found.state.get("launch") == launch:
                return found, skipped
        return None, skipped

    def begin(self, step: int) -> str:
        """The path of a new, empty checkpoint directory. Asserts that no whole one of that step is there."""
        name = step_name(step)
        assert not isinstance(self.check(name), Found), f"{name} is there already"
        self.remove(name)
        self.fs.makedirs(f"{self.root}/{name}", exist_ok=True)
        return f"{self.run_dir}/{name}"

    def commit(self, step: int, state: dict[str, Any]) -> None:
        """Make the checkpoint count: its state, then the manifest over all its files."""
        name = step_name(step)
        self.write_json(f"{name}/{STATE}", state)
        self.fs.invalidate_cache()
        base = f"{self.root}/{name}"
        files = {str(path)[len(base) + 1 :]: self.fs.size(path) for path in self.fs.find(base)}
        self.write_json(f"{name}/{MANIFEST}", {"version": 1, "step": step, "files": files})

    def keep_last(self, count: int) -> None:
        """Delete all but the newest `count` checkpoints; directories that don't count go as well once a newer one does."""
        whole = [name for name in self.step_names() if self.exists(f"{name}/{MANIFEST}")]
        for name in self.step_names():
            if name not in whole[-count:] and whole and int(name[5:]) < int(whole[-1][5:]):
                # the manifest first: a half-deleted directory must not count
                self.remove(f"{name}/{MANIFEST}")
                self.remove(name)


def at(path: str) -> Found | str:
    """The checkpoint at a full path, or why it doesn't count."""
    directory, _, name = path.rstrip("/").rpartition("/")
    if not NAME.fullmatch(name):
        return "is no checkpoint: its name is not step_<number>"
    return Store(directory).check(name)
