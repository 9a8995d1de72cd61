"""The ranks of the GPU tests: one for each GPU, or as many as GPU_RANKS says, sharing GPUs.

Ranks share a GPU with NCCL 2.30 or later (LD_PRELOAD where torch has an older one),
NCCL_MULTI_RANK_GPU_ENABLE=1 and TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1. They take turns: the
numbers are what they are on GPUs of their own, the times are not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

GPUS = torch.cuda.device_count()
SIZE = int(os.environ.get("GPU_RANKS", GPUS)) if GPUS else 0


def spawn(function: Callable[..., None], store: Path, *args: Any) -> None:
    """Run `function(device, *args)` on every rank, in a process of its own, with a default process
    group of them.
    """
    multiprocessing.spawn(_rank, (function, str(store), args), nprocs=SIZE)


def _rank(rank: int, function: Callable[..., None], store: str, args: tuple[Any, ...]) -> None:
    device = torch.device("cuda", rank % GPUS)
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.FileStore(store, SIZE), rank=rank, world_size=SIZE
    )
    function(device, *args)
    torch.cuda.synchronize()
    dist.destroy_process_group()
