"""Kills a process group in the middle of saving, again and again, and looks at what the next start
finds.

    python benchmarks/kill_during_save.py kills=50 ranks=2 seed=0 directory=/tmp/kills

Every save holds tensors that are a function of its step, so that a mixture of two saves shows.
After each kill (-9, all ranks at once, at a random moment while they save without pause) the next
group takes up the newest checkpoint that verifies. Counted are: `torn`, chosen checkpoints whose
tensors are not their step's; `lost`, where an older one was found than a save that had been
reported as done; `leftovers`, what killed saves left behind at the moment of the next start. Exit
code 1 where torn or lost is not 0.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_trainer.checkpoint.files import local
from tp_trainer.checkpoint.saving import Checkpoints
from tp_trainer.checkpoint.state import RunState
from tp_trainer.checkpoint.store import DRAFT

START_SECONDS = 120


class Model(nn.Module):
    """Some megabytes: a sharded tensor and replicated ones."""

    def __init__(self) -> None:
        super().__init__()
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.sharded = nn.Parameter(
            distribute_tensor(torch.zeros(1 << 10, 1 << 10), mesh, [Shard(0)])
        )
        self.replicated = nn.ParameterList(
            nn.Parameter(torch.zeros(100 + size)) for size in range(8)
        )


def value(step: int, tensor: torch.Tensor) -> torch.Tensor:
    """What a tensor holds at a step."""
    return torch.arange(tensor.numel(), dtype=tensor.dtype).view(tensor.shape) % 97 + 1000 * step


def rank_main(rank: int, ranks: int, directory: str, group: str, report: Any) -> None:
    """Take up the newest, tell what it was, then save one step after another until killed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(group, ranks), rank=rank, world_size=ranks)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    saves = Checkpoints(f"{directory}/run", 2, model, optimizer, torch.device("cpu"))
    found, skipped = saves.newest()
    torn = False
    if found is not None:
        saves.restore(found)
        tensors = [local(tensor) for tensor in saves.tensors(with_rng=False).values()]
        torn = not all(torch.equal(tensor, value(found.step, tensor)) for tensor in tensors)
    else:  # an optimizer has no state before its first step
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    step = found.step if found else 0
    report.put((rank, step, torn, skipped))
    with Path(f"{directory}/done.{rank}").open("a", encoding="utf-8") as done:
        while True:
            step += 1
            with torch.no_grad():
                for tensor in map(local, saves.tensors(with_rng=False).values()):
                    tensor.copy_(value(step, tensor))
            counts = RunState(step, epoch=0, offset=step, tokens=step, global_batch_size=1)
            saves.save(counts, last=step % 3 == 0)
            for saved in saves.done():
                if saved.path is None:
                    raise RuntimeError(saved.error)
                done.write(f"{saved.step}\n")
                done.flush()


def last_done(directory: str, ranks: int) -> int:
    """The newest step that any rank was told of as saved."""
    lines = [
        line
        for rank in range(ranks)
        for line in (Path(directory) / f"done.{rank}").read_text().splitlines()
    ]
    return max(map(int, lines), default=0)


def kill_during_save(directory: str, kills: int, ranks: int, seed: int) -> dict[str, int]:
    """Counts, as in the module's description. Raises RuntimeError where a group doesn't start."""
    context, rng = multiprocessing.get_context("fork"), random.Random(seed)
    counts = {"kills": 0, "torn": 0, "lost": 0, "leftovers": 0, "saved": 0}
    expected = 0
    for rank in range(ranks):
        Path(directory, f"done.{rank}").touch()
    for number in range(kills + 1):
        run = Path(directory, "run")
        counts["leftovers"] += (
            any(each.name.startswith(DRAFT) for each in run.iterdir()) if run.exists() else 0
        )
        report = context.Queue()
        group = f"{directory}/group-{number}"
        processes = [
            context.Process(target=rank_main, args=(rank, ranks, directory, group, report))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            for _ in processes:
                _, step, torn, _ = report.get(timeout=START_SECONDS)
                counts["torn"] += torn
                counts["lost"] += step < expected
            if number < kills:
                time.sleep(rng.uniform(0.0, 0.6))
                counts["kills"] += 1
            if not all(process.is_alive() for process in processes):
                raise RuntimeError("a rank ended by itself")
        finally:
            for process in processes:
                os.kill(process.pid, signal.SIGKILL)  # all of them before any has noticed
            for process in processes:
                process.join()
        expected = last_done(directory, ranks)
    counts["saved"] = expected
    return counts


def main() -> None:
    options = {"kills": "50", "ranks": "2", "seed": "0", "directory": ""} | dict(
        each.split("=", 1) for each in sys.argv[1:]
    )
    directory = options["directory"] or tempfile.mkdtemp(prefix="kill-during-save-")
    os.makedirs(directory, exist_ok=True)
    try:
        counts = kill_during_save(
            directory, int(options["kills"]), int(options["ranks"]), int(options["seed"])
        )
    finally:
        if not options["directory"]:
            shutil.rmtree(directory, ignore_errors=True)
    print(json.dumps(counts))
    sys.exit(1 if counts["torn"] or counts["lost"] else 0)


if __name__ == "__main__":
    main()
