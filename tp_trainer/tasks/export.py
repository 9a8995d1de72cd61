"""task=export: a checkpoint becomes a directory that plain transformers loads.

Each safetensors file is a job of its own, which reads its whole tensors from the checkpoint, casts and writes them: no
process ever holds the model, and no GPU is needed. What the model is stands in the run's config.yaml, beside the checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from tp_trainer.checkpoint.store import Found, Store, at
from tp_trainer.config import Config, ConfigError, hub_file
from tp_trainer.data.tokens import load_tokenizer
from tp_trainer.driver import run_jobs

INDEX = "model.safetensors.index.json"
PROCESS_BYTES = 1 << 29  # Python with torch


@dataclass(frozen=True)
class File:
    """A safetensors file to be written."""

    checkpoint: str
    directory: str  # a path or an fsspec URL
    name: str
    shapes: dict[str, tuple[int, ...]]
    dtype: str


def run(config: Config) -> dict[str, Any]:
    """Export `checkpoint.path` to `export.output`; of the other keys only `cluster` matters. Returns a summary, printed too.

    Raises:
        ConfigError: refused, before Ray starts but for a node that doesn't see the output.
        RunFailed: a file couldn't be written.
    """
    began = time.time()
    found = _checkpoint(config.checkpoint.path)
    output = free_output(config.export.output)
    stored = _run_config(found)
    tokenizer = _tokenizer(stored)
    dtype, remote = config.export.dtype, "://" in output
    # files whose names count appear under the output's name only once all is there: by a rename, or by the index's being last
    part = output if remote else f"{output}.part-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as scratch:
        small = Path(scratch) if remote else Path(part)  # where what isn't weights is put together
        try:
            if not remote:
                _make(Path(part), output)
            shapes = _describe(found, stored, tokenizer, dtype, small)
            notice = _other_tokenizer(tokenizer, small, output)
            files = [File(found.path, part, name, each, dtype) for name, each in partition(shapes, dtype, config.export.max_shard_gib)]
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
    summary = {
        "status": "exported", "output": output, "checkpoint": found.path, "step": found.step, "files": len(files), "tensors": len(shapes),
        "parameters": sum(map(prod, shapes.values())), "bytes": sum(sizes), "dtype": dtype, "tokenizer": tokenizer is not None,
        "wall_seconds": time.time() - began,
    }  # fmt: skip
    print(_lines(summary, notice), flush=True)
    return summary


# ------------------------------------------------------------------------------------------------------ what is asked


def _checkpoint(path: str | None) -> Found:
    if path is None:
        raise ConfigError("checkpoint.path", None, "is missing: task=export needs a checkpoint, e.g. checkpoint.path=<run>/step_00000100")
    where = path if "://" in path else str(Path(path).expanduser().resolve())
    try:
        found = at(where)
        newest = Store(where).newest()[0] if isinstance(found, str) else None  # the run's directory was given
    except Exception as error:  # every file system has its own
        raise ConfigError("checkpoint.path", path, f"can't be read ({error})") from error
    if isinstance(found, str):
        raise ConfigError("checkpoint.path", path, found + (f"; give one of its checkpoints, e.g. {newest.path}" if newest else ""))
    return found


def free_output(path: str | None) -> str:
    """Where to write, absolute. Raises ConfigError where something is there already."""
    if path is None:
        raise ConfigError("export.output", None, "is missing: task=export needs a directory to write, e.g. export.output=exported")
    where = path.rstrip("/") if "://" in path else str(Path(path).expanduser().resolve())
    try:
        fs, root = url_to_fs(where)
        taken = fs.exists(root) and (not fs.isdir(root) or bool(fs.ls(root, detail=False)))
    except Exception as error:
        raise ConfigError("export.output", path, f"can't be read ({error})") from error
    if taken:
        raise ConfigError("export.output", path, "is there already, and no empty directory; give another one")
    return where


def _make(part: Path, output: str) -> None:
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise ConfigError("export.output", output, f"not writable ({error})") from error


def _run_config(found: Found) -> Mapping[str, Any]:
    """The run's config.yaml, as plain dictionaries."""
    run_dir = found.path.rpartition("/")[0]
    stored = Store(run_dir).read_yaml("config.yaml")
    if stored is None:
        raise ConfigError("checkpoint.path", found.path, f"{run_dir}/config.yaml is missing or no YAML: it says which model this is")
    model, data = stored.get("model"), stored.get("data")
    if not (isinstance(model, dict) and isinstance(model.get("architecture"), dict) and isinstance(data, dict)):
        raise ConfigError("checkpoint.path", found.path, f"{run_dir}/config.yaml states no model.architecture and data: it is no run's")
    return stored


def _tokenizer(stored: Mapping[str, Any]) -> Any | None:
    """The run's tokenizer; None where it had random tokens."""
    name = stored["data"].get("tokenizer")
    if name is None:
        return None
    return load_tokenizer(str(name), bool(stored["model"].get("trust_remote_code")))


# -------------------------------------------------------------------------------------------------------- the files


def _describe(found: Found, stored: Mapping[str, Any], tokenizer: Any | None, dtype: str, directory: Path) -> dict[str, tuple[int, ...]]:
    """Write config.json, generation_config.json and the tokenizer's files. Returns the shapes of the parameters to write."""
    import torch

    from tp_trainer.checkpoint.state import stored_parameters
    from tp_trainer.models.build import meta_model

    model = meta_model(dict(stored["model"]["architecture"]))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # a tied head goes by its embedding's name
    have = stored_parameters(found.path)
    if wrong := sorted(name for name in shapes.keys() | have.keys() if shapes.get(name) != have.get(name)):
        raise ConfigError("checkpoint.path", found.path, f"its tensors are not those of the model in the run's config.yaml: {wrong[0]} "
                          f"has shape {have.get(wrong[0])}, the model's is {shapes.get(wrong[0])}")  # fmt: skip
    model.config.architectures, model.config.dtype = [type(model).__name__], getattr(torch, dtype)
    model.config.save_pretrained(directory)
    _generation_config(model, stored["model"], tokenizer).save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return shapes


def _other_tokenizer(tokenizer: Any | None, directory: Path, output: str) -> str | None:
    """A sentence for the user where transformers' AutoTokenizer makes another tokenizer of the files written.

    For some model types (qwen2 among them) it takes a class that reads but the vocabulary and splits text in its own way.
    """
    from transformers import AutoTokenizer

    if tokenizer is None or not hasattr(tokenizer, "backend_tokenizer"):
        return None
    other = AutoTokenizer.from_pretrained(directory)
    one, two = (json.loads(each.backend_tokenizer.to_str()) for each in (tokenizer, other))
    parts = [part for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder") if one[part] != two[part]]
    parts += [part for part in ("vocab", "merges") if one["model"].get(part) != two["model"].get(part)]
    if not parts:
        return None
    return (f"for this model type AutoTokenizer takes {type(other).__name__}, which has another {' and '.join(parts)} than the run's "
            f"tokenizer; the run's own: PreTrainedTokenizerFast.from_pretrained('{output}')")  # fmt: skip


def _generation_config(model: Any, settings: Mapping[str, Any], tokenizer: Any | None) -> Any:
    """The pretrained model's own, where it can be had (its end-of-text ids may be more than config.json says); else derived."""
    from transformers import GenerationConfig

    name, file = settings.get("name"), "generation_config.json"
    if settings.get("weights") == "pretrained" and name:
        try:
            path = Path(name) / file if Path(name).is_dir() else hub_file(name, file)
            return GenerationConfig.from_pretrained(path.parent)
        except Exception:  # it has none, or the hub is out of reach
            return model.generation_config
    if tokenizer is not None:  # trained from nothing with it; the architecture's ids are another's
        for each in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.generation_config, each, getattr(tokenizer, each))
    return model.generation_config


def partition(shapes: Mapping[str, tuple[int, ...]], dtype: str, max_gib: float) -> list[tuple[str, dict[str, tuple[int, ...]]]]:
    """File names and what goes into each, in the model's order: at most `max_gib`, but at least one tensor."""
    limit, itemsize = max_gib * 2**30, 4 if dtype == "float32" else 2
    groups: list[dict[str, tuple[int, ...]]] = []
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
    return [(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group) for number, group in enumerate(groups, 1)]


def _memory(file: File) -> int:
    """Bytes that writing a file takes: its tensors, while reading at most the largest one as stored (float32), the process."""
    counts = [prod(shape) for shape in file.shapes.values()]
    return sum(counts) * (4 if file.dtype == "float32" else 2) + max(counts) * 4 + PROCESS_BYTES


def write_file(file: File) -> int:
    """Read a file's tensors from the checkpoint and write them. Returns the tensors' bytes. Runs as a Ray task."""
    import torch
    from safetensors.torch import save_file

    from tp_trainer.checkpoint.state import read_parameters

    remote = "://" in file.directory
    if not remote and not Path(file.directory).is_dir():
        raise ConfigError("export.output", file.directory.rpartition(".part-")[0],
                          f"node {socket.gethostname()} doesn't see it; give a directory that all nodes share, or a URL")  # fmt: skip
    tensors = {name: torch.empty(shape, dtype=getattr(torch, file.dtype)) for name, shape in file.shapes.items()}
    read_parameters(file.checkpoint, tensors)
    if file.dtype == "float16" and (large := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]):
        raise ConfigError("export.dtype", "float16", f"{large[0]} has values that it can't hold; give bfloat16 or float32")
    with tempfile.TemporaryDirectory() as scratch:
        target = f"{scratch}/{file.name}" if remote else f"{file.directory}/{file.name}"
        save_file(tensors, target, metadata={"format": "pt"})
        os.umask(mask := os.umask(0))
        os.chmod(target, 0o666 & ~mask)  # safetensors may make it its owner's alone
        if remote:
            _upload(Path(scratch), file.directory)
    return sum(tensor.nbytes for tensor in tensors.values())


def _index(files: list[File], path: Path) -> None:
    """model.safetensors.index.json, as transformers writes it."""
    total = sum(prod(shape) for file in files for shape in file.shapes.values())
    metadata = {"total_parameters": total, "total_size": total * (4 if files[0].dtype == "float32" else 2)}
    weight_map = {name: file.name for file in files for name in file.shapes}
    path.write_text(json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n")


def _upload(directory: Path, url: str) -> None:
    """Move a directory's files to a URL."""
    fs, root = url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    for path in sorted(directory.iterdir()):
        fs.put_file(str(path), f"{root}/{path.name}")
        path.unlink()


def _lines(summary: Mapping[str, Any], notice: str | None) -> str:
    rows = {
        "output": summary["output"],
        "checkpoint": f"{summary['checkpoint']} (step {summary['step']})",
        "weights": f"{summary['parameters']:,} parameters in {summary['tensors']} tensors, {summary['dtype']}, "
                   f"{summary['bytes'] / 2**30:.2f} GiB in {summary['files']} file{'s' if summary['files'] > 1 else ''}",
        "tokenizer": "the run's" if summary["tokenizer"] else "none: the run had random tokens",
        **({"note": notice} if notice else {}),
        "time": f"{summary['wall_seconds']:.1f} s",
    }  # fmt: skip
    return "\n".join(["exported", *(f"  {name:<10}  {value}" for name, value in rows.items())])
