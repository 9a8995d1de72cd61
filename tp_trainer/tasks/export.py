"""task=export: a checkpoint becomes a directory that plain transformers loads.

Each safetensors file is a job of its own, which reads its whole tensors from the checkpoint, casts
and writes them: no process ever holds the model, and no GPU is needed. What the model is stands in
the run's config.yaml, beside the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal, TypedDict

from fsspec.core import url_to_fs

from tp_trainer.checkpoint.store import VerifiedCheckpoint, named
from tp_trainer.config import Config, ConfigError
from tp_trainer.driver import run_jobs
from tp_trainer.tasks.describe import (
    Constants,
    Shapes,
    StoredRun,
    describe,
    other_tokenizer,
    stored_names,
)

INDEX = "model.safetensors.index.json"
PROCESS_BYTES = 1 << 29  # Python with torch


@dataclass(frozen=True)
class File:
    """A safetensors file to be written."""

    checkpoint: str
    directory: str  # a path or an fsspec URL
    name: str
    shapes: Shapes
    dtype: str
    constants: Constants  # buffers to write along
    # of tensors that have another one in files
    names: dict[str, str] = field(default_factory=dict)


class Exported(TypedDict):
    """What an export came to."""

    status: Literal["exported"]
    output: str  # an absolute path or a URL
    checkpoint: str
    step: int
    files: int  # with weights
    tensors: int
    parameters: int
    bytes: int
    dtype: str
    tokenizer: bool  # whether the run had one
    wall_seconds: float


def run(config: Config) -> Exported:
    """Export `checkpoint.path` to `export.output`; of the other keys only `cluster` matters.

    Raises:
        ConfigError: refused, before Ray starts but for a node that doesn't see the output.
        RunFailed: a file couldn't be written.
    """
    began = time.time()
    found = _checkpoint(config.checkpoint.path)
    output = free_output(config.export.output)
    stored = _run_of(found)
    tokenizer = stored.tokenizer()
    dtype, remote = config.export.dtype, "://" in output
    # files whose names count appear under the output's name only once all is there: by a rename, or
    # by the index's being last
    part = output if remote else f"{output}.part-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) if remote else Path(part)  # where what isn't weights is put together
        try:
            if not remote:
                _make(Path(part), output)
            shapes, constants = describe(found, stored, tokenizer, dtype, small)
            names = stored_names(stored, shapes)
            notice = other_tokenizer(tokenizer, small, output)
            files = [
                File(found.path, part, name, each, dtype, {} if number else constants, names)
                for number, (name, each) in enumerate(
                    partition(shapes, dtype, config.export.max_shard_gib)
                )
            ]
            sizes = run_jobs(config.cluster, write_file, files, [_memory(file) for file in files])
            if remote:
                _upload(small, output)
            if len(files) > 1:
                _index(files, small / INDEX)
            if remote:
                _upload(small, output)
            else:
                os.rename(part, output)
        finally:
            if not remote:
                shutil.rmtree(part, ignore_errors=True)
    summary: Exported = {
        "status": "exported",
        "output": output,
        "checkpoint": found.path,
        "step": found.step,
        "files": len(files),
        "tensors": len(shapes),
        "parameters": sum(map(prod, shapes.values())),
        "bytes": sum(sizes),
        "dtype": dtype,
        "tokenizer": tokenizer is not None,
        "wall_seconds": time.time() - began,
    }
    print(_lines(summary, notice), flush=True)
    return summary


# --------------------------------------------------------------------------------------------------


def _checkpoint(path: str | None) -> VerifiedCheckpoint:
    if path is None:
        raise ConfigError(
            "checkpoint.path",
            None,
            "is missing: task=export needs a checkpoint, e.g. checkpoint.path=<run>/step_00000100",
        )
    where = path if "://" in path else str(Path(path).expanduser().resolve())
    return named("checkpoint.path", where)


def free_output(path: str | None) -> str:
    """Where to write, absolute. Raises ConfigError where something is there already."""
    if path is None:
        raise ConfigError(
            "export.output",
            None,
            "is missing: task=export needs a directory to write, e.g. export.output=exported",
        )
    where = path.rstrip("/") if "://" in path else str(Path(path).expanduser().resolve())
    try:
        fs, root = url_to_fs(where)
        taken = fs.exists(root) and (not fs.isdir(root) or bool(fs.ls(root, detail=False)))
    except Exception as error:
        raise ConfigError("export.output", path, f"can't be read ({error})") from error
    if taken:
        raise ConfigError(
            "export.output", path, "is there already, and no empty directory; give another one"
        )
    return where


def _make(part: Path, output: str) -> None:
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise ConfigError("export.output", output, f"not writable ({error})") from error


def _run_of(found: VerifiedCheckpoint) -> StoredRun:
    """What the config.yaml beside a checkpoint says of the run."""
    run_dir = found.path.rpartition("/")[0]
    try:
        return StoredRun.of(run_dir)
    except ValueError as error:
        raise ConfigError(
            "checkpoint.path", found.path, f"{run_dir}/config.yaml {error}"
        ) from error


# --------------------------------------------------------------------------------------------------


def partition(shapes: Shapes, dtype: str, max_gib: float) -> list[tuple[str, Shapes]]:
    """File names and what goes into each, in the model's order: at most `max_gib`, but at least one
    tensor.
    """
    limit, itemsize = max_gib * 2**30, 4 if dtype == "float32" else 2
    groups: list[Shapes] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = prod(shape) * itemsize
        if not groups or size + nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += nbytes
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [
        (f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, 1)
    ]


def _memory(file: File) -> int:
    """Bytes that writing a file takes: its tensors, while reading at most the largest one as stored
    (float32), the process.
    """
    counts = [prod(shape) for shape in file.shapes.values()]
    return sum(counts) * (4 if file.dtype == "float32" else 2) + max(counts) * 4 + PROCESS_BYTES


def write_file(file: File) -> int:
    """Read a file's tensors from the checkpoint and write them. Returns the tensors' bytes. Runs as
    a Ray task.
    """
    import torch
    from safetensors.torch import save_file

    from tp_trainer.checkpoint.restoring import read_parameters

    remote = "://" in file.directory
    if not remote and not Path(file.directory).is_dir():
        raise ConfigError(
            "export.output",
            file.directory.rpartition(".part-")[0],
            f"node {socket.gethostname()} doesn't see it; give a directory that all nodes share, or"
            " a URL",
        )
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, file.dtype))
        for name, shape in file.shapes.items()
    }
    read_parameters(file.checkpoint, tensors)
    if file.dtype == "float16" and (
        large := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    ):
        raise ConfigError(
            "export.dtype",
            "float16",
            f"{large[0]} has values that it can't hold; give bfloat16 or float32",
        )
    with tempfile.TemporaryDirectory() as scratch:
        target = f"{scratch}/{file.name}" if remote else f"{file.directory}/{file.name}"
        constants = {
            name: torch.tensor(value, dtype=getattr(torch, file.dtype))
            for name, value in file.constants.items()
        }
        named = {file.names.get(name, name): each for name, each in tensors.items()}
        save_file(named | constants, target, metadata={"format": "pt"})
        os.umask(mask := os.umask(0))
        os.chmod(target, 0o666 & ~mask)  # safetensors may make it its owner's alone
        if remote:
            _upload(Path(scratch), file.directory)
    return sum(tensor.nbytes for tensor in tensors.values())


def _index(files: list[File], path: Path) -> None:
    """model.safetensors.index.json, as transformers writes it."""
    total = sum(prod(shape) for file in files for shape in file.shapes.values())
    metadata = {
        "total_parameters": total,
        "total_size": total * (4 if files[0].dtype == "float32" else 2),
    }
    weight_map = {
        file.names.get(name, name): file.name
        for file in files
        for name in {**file.shapes, **file.constants}
    }
    path.write_text(
        json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        + "\n",
        encoding="utf-8",
    )


def _upload(directory: Path, url: str) -> None:
    """Move a directory's files to a URL."""
    fs, root = url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    for path in sorted(directory.iterdir()):
        fs.put_file(str(path), f"{root}/{path.name}")
        path.unlink()


def _lines(summary: Exported, notice: str | None) -> str:
    rows = {
        "output": summary["output"],
        "checkpoint": f"{summary['checkpoint']} (step {summary['step']})",
        "weights": (
            f"{summary['parameters']:,} parameters in {summary['tensors']} tensors,"
            f" {summary['dtype']}, {summary['bytes'] / 2**30:.2f} GiB in {summary['files']}"
            f" file{'s' if summary['files'] > 1 else ''}"
        ),
        "tokenizer": "the run's" if summary["tokenizer"] else "none: the run had random tokens",
        **({"note": notice} if notice else {}),
        "time": f"{summary['wall_seconds']:.1f} s",
    }
    return "\n".join(["exported", *(f"  {name:<10}  {value}" for name, value in rows.items())])
