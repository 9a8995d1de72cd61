"""Measures checkpoints without Ray: pause and total of a save, in the background and not, and the
time of a load in two layouts.

    python benchmarks/checkpoints.py out=/dir parallelism=tp2_dp1 other=tp1_dp2 saves=3 \\
        model=qwen2_7b model.weights=random

One process a rank is started here: on GPUs where there are enough, else on the CPU. What is not
`out`, `other` (the layout of the second load), `saves` (how many of each kind) or `steps` (training
steps between them) is given to the configuration as on launch.py's command line. Prints one line of
JSON per measurement; `<out>/checkpoints` is deleted first and last.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "distributed"))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rank_cases import Trainer, trainer
from torch.distributed.tensor import DTensor

from tp_trainer.checkpoint.files import local
from tp_trainer.checkpoint.saving import Checkpoints
from tp_trainer.checkpoint.state import RunState
from tp_trainer.host import free_host_memory


def composed(overrides: list[str]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from tp_trainer.cli.arguments import conf_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        values = OmegaConf.to_container(
            compose("config", ["data=random", *overrides]), resolve=True
        )
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def made_of(settings: dict[str, Any], device: torch.device) -> Trainer:
    """One rank's model, optimizer and data; a micro-batch a step."""
    return trainer({**settings, "train": {**settings["train"], "global_batch_size": None}}, device)


def step(made: Trainer) -> float:
    """One training step; its seconds, until the device is done."""
    began = time.perf_counter()
    made.step()
    return time.perf_counter() - began


def checkpoints_of(made: Trainer, out: str, asynchronous: bool) -> Checkpoints:
    module, optimizer, device = made.model.module, made.optimizer, made.mesh.device
    return Checkpoints(out, 1, module, optimizer, device, asynchronous=asynchronous)


def measure(
    rank: int,
    world: int,
    port: int,
    gpu: bool,
    options: dict[str, str],
    first: dict[str, Any],
    second: dict[str, Any],
) -> None:
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }
    if gpu:
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream())  # steps on the default one can't become graphs
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    out, saves, steps = (
        f"{options['out']}/checkpoints",
        int(options["saves"]),
        int(options["steps"]),
    )

    def say(**row: Any) -> None:
        if rank == 0:
            print(
                json.dumps(
                    {
                        key: round(value, 4) if isinstance(value, float) else value
                        for key, value in row.items()
                    }
                ),
                flush=True,
            )

    made = made_of(first, device)
    seconds = [step(made) for _ in range(5)]
    plain = statistics.median(seconds[2:])
    free = (free_host_memory() or 0) / 2**30
    say(
        what="step",
        layout=made.config.parallelism.layout,
        seconds=plain,
        peak_gib=peak(device),
        free_host_gib=free,
    )
    number = 0
    sums: list[torch.Tensor] = []
    for asynchronous in (True, False):
        checkpoints = checkpoints_of(made, out, asynchronous)
        checkpoints.prepare()
        for _ in range(saves):
            number += 1
            state = RunState(number, epoch=0, offset=0, tokens=0, global_batch_size=1)
            sums = checksums(checkpoints)
            checkpoints.save(state, last=False)
            during = [step(made) for _ in range(steps)]
            began = time.perf_counter()
            checkpoints.wait()
            waited = time.perf_counter() - began
            (saved,) = checkpoints.done()
            pauses: list[Any] = [None] * world
            dist.all_gather_object(pauses, saved.pause_seconds)
            say(
                what="save",
                asynchronous=asynchronous,
                pause_seconds=max(pauses),
                pause_of_step=max(pauses) / plain,
                seconds=saved.seconds,
                bytes=saved.bytes,
                gib_per_second=saved.bytes / saved.seconds / 2**30,
                step_seconds_during=statistics.median(during),
                waited_after=waited,
                peak_gib=peak(device),
                error=saved.error,
                notes=saved.notes,
            )
        del checkpoints
    for settings in (first, second):
        made.model.close()
        made = None  # type: ignore[assignment]
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
        made = made_of(settings, device)
        checkpoints = checkpoints_of(made, out, True)
        began = time.perf_counter()
        found, skipped = checkpoints.newest()
        verified = time.perf_counter()
        assert found is not None, skipped
        checkpoints.restore(found)
        if gpu:
            torch.cuda.synchronize()
        ended = time.perf_counter()
        equal = all(
            torch.equal(one, other) for one, other in zip(sums, checksums(checkpoints), strict=True)
        )
        say(
            what="load",
            layout=made.config.parallelism.layout,
            seconds=ended - began,
            verify_seconds=verified - began,
            read_seconds=ended - verified,
            equal=equal,
        )
        del checkpoints
    made.model.close()
    dist.destroy_process_group()


def checksums(checkpoints: Checkpoints) -> list[torch.Tensor]:
    """Of every whole tensor a number that its bytes give, the same in any layout (sums of integers
    are exact in any order).
    """
    sums = []
    for tensor in checkpoints.tensors(with_rng=False).values():
        part = local(tensor).contiguous()
        number = (
            part.reshape(-1)
            .view(torch.int32 if part.element_size() == 4 else torch.int16)
            .sum(dtype=torch.int64)
        )
        replicas, number = dist.get_world_size(), number.cpu()
        if isinstance(tensor, DTensor):  # its mesh may be that of a part of the world
            for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
                replicas //= size if not placement.is_replicate() else 1
        dist.all_reduce(number, group=checkpoints.ranks.group)
        sums.append(number // replicas)
    return sums


def peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def main() -> None:
    own = {"out": "", "other": "", "saves": "3", "steps": "5"}
    options, overrides = dict(own), []
    for each in sys.argv[1:]:
        key, _, value = each.partition("=")
        if key in own:
            options[key] = value
        else:
            overrides.append(each)
    if not options["out"]:
        sys.exit("error: out=<directory> is missing: where the checkpoints go")
    first = composed(overrides)
    second = composed(
        [*overrides, f"parallelism={options['other']}"] if options["other"] else overrides
    )
    world = first["parallelism"]["tp"] * first["parallelism"]["dp"]
    if second["parallelism"]["tp"] * second["parallelism"]["dp"] != world:
        sys.exit("error: other: must have as many workers as parallelism")
    gpu = torch.cuda.device_count() >= world
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.rmtree(Path(options["out"], "checkpoints"), ignore_errors=True)
    try:
        mp.spawn(measure, (world, port, gpu, options, first, second), nprocs=world)
    finally:
        shutil.rmtree(Path(options["out"], "checkpoints"), ignore_errors=True)


if __name__ == "__main__":
    main()
