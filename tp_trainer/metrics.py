"""FLOPs, MFU and memory: each formula once, with its source."""

from __future__ import annotations

import math
import resource
import statistics
import sys
from collections.abc import Sequence

import torch

from tp_trainer.config import Architecture

PEAK_FLOPS = {
    "H100 PCIe": 756e12,  # FLOP/s, NVIDIA H100 datasheet, PCIe, dense bf16
    "H100": 989e12,  # FLOP/s, NVIDIA H100 datasheet, SXM, dense bf16
    "H200": 989e12,  # FLOP/s, NVIDIA H200 datasheet, dense bf16
    "B200": 2250e12,  # FLOP/s, NVIDIA HGX B200 datasheet, dense bf16
    "A100": 312e12,  # FLOP/s, NVIDIA A100 datasheet, dense bf16
    "L40S": 362e12,  # FLOP/s, NVIDIA L40S datasheet, dense bf16
    "A10G": 70e12,  # FLOP/s, NVIDIA A10G datasheet, dense bf16
    "L4": 121e12,  # FLOP/s, NVIDIA L4 datasheet, dense bf16
}


def flops_per_token(
    weights: int, architecture: Architecture, seq_length: int, causal: bool = False
) -> float:
    """FLOPs of forward and backward pass for one token, recomputation not counted.

    6 per weight that a token is multiplied with (Kaplan et al. 2020, arXiv:2001.08361) and 12 L H S
    for attention, causality not subtracted (PaLM, Chowdhery et al. 2022, arXiv:2204.02311, appendix
    B; as torchtitan counts).

    Args:
        weights: of all linears, the head's included (`ParallelModel.matmul_weights`).
        architecture: for attention's sizes.
        causal: count the half of attention's matmuls that the mask lets through, 6 L H S
            (FlashAttention-2, Dao 2023, arXiv:2307.08691, section 4.1).
    """
    a = architecture
    width = a.num_hidden_layers * a.num_attention_heads * a.head_dim
    return 6 * weights + (6 if causal else 12) * width * seq_length


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the device by its datasheet, dense bf16, or None where it isn't known."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """FLOP/s of a GPU by its name, as `peak_flops`."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name.replace("-", " ")), None)


def mfu(tokens_per_second: float, flops: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation of one device, in [0, 1].

    Args:
        tokens_per_second: of this device.
        flops: of a token, see `flops_per_token`.
        peak: FLOP/s; where it isn't known, neither is the utilisation.
    """
    return tokens_per_second * flops / peak if peak else None


def peak_memory_gib(device: torch.device) -> float:
    """GiB: the most that the allocator has reserved on a GPU, or the most that this process has
    held on CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def optimal_interval(pauses: Sequence[float], mean_time_between_failures: float) -> float:
    """Seconds from one checkpoint to the next that lose the least to pauses and to steps done
    again.

    sqrt(2 C M), with C the pause of a save and M the mean time between failures (Young 1974, "A
    first order approximation to the optimum checkpoint interval"; Daly 2006 gives corrections,
    which matter where C is no longer small beside M).

    Args:
        pauses: seconds of each save so far; the median counts, and of more than one not the first,
            which plans as well.
    """
    return math.sqrt(2 * statistics.median(pauses[1:] or pauses) * mean_time_between_failures)
