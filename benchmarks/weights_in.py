"""How much host memory a worker needs to load a model: makes a directory of random weights and
trains from it.

    python benchmarks/weights_in.py <directory> parallelism=tp2_dp1 [model=qwen2_7b] [more keys]

Prints the most private memory (RssAnon: pages of mapped files don't count) that each worker held,
sampled every 50 ms until the first step is done, and how large the weights are as a whole.
<directory> gets the weights (bfloat16, sharded safetensors) and the run's files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from tp_trainer.models.description import meta_model
from tp_trainer.tasks.export import partition

ROOT = Path(__file__).resolve().parents[1]


def write_weights(directory: Path, group: str) -> int:
    """Random weights for a model of conf/model, as save_pretrained would write them. Returns their
    bytes.
    """
    architecture = yaml.safe_load((ROOT / "conf" / "model" / f"{group}.yaml").read_text())[
        "architecture"
    ]
    model = meta_model(architecture)
    model.config.save_pretrained(directory)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weight_map, total, block = dict[str, str](), 0, (0.02 * torch.randn(1 << 20)).bfloat16()
    for file, each in partition(shapes, "bfloat16", 5.0):
        tensors = {
            name: block.repeat(-(-prod(shape) // len(block)))[: prod(shape)].view(shape)
            for name, shape in each.items()
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def private_memory() -> dict[int, int]:
    """Bytes of private memory of each worker, by process id."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"RayTrainWorker" in (process / "cmdline").read_bytes():
                fields = dict(
                    line.split(":", 1) for line in (process / "status").read_text().splitlines()
                )
                found[int(process.name)] = int(fields["RssAnon"].split()[0]) * 1024
        except (OSError, KeyError):
            pass  # it has just ended
    return found


def main(directory: Path, keys: list[str]) -> int:
    groups = [key.removeprefix("model=") for key in keys if key.startswith("model=")]
    weights = directory / "weights"
    weights.mkdir(parents=True)
    size = write_weights(weights, groups[0] if groups else "tiny")
    keys = [key for key in keys if not key.startswith("model=")]
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        f"model.name={weights}",
        f"checkpoint.storage_path={directory}",
        "checkpoint.interval=null",
        "tracker=none",
        *keys,
    ]
    print(" ".join(command), flush=True)
    most: dict[int, int] = {}
    run = subprocess.Popen(command)
    # until the first step is done
    while run.poll() is None and not list(directory.glob("*/metrics.jsonl")):
        for process, held in private_memory().items():
            most[process] = max(held, most.get(process, 0))
        time.sleep(0.05)
    print(f"weights: {size / 2**30:.1f} GiB in bfloat16")
    for process, held in sorted(most.items()):
        print(f"worker {process}: at most {held / 2**30:.1f} GiB of private host memory")
    code = run.poll()
    run.terminate()
    run.wait()
    return code or 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
