"""What the compiler's caches must know, and don't by themselves."""

from __future__ import annotations


def name_instruction_set() -> None:
    """Make the processor's vectors a part of the key of Inductor's cached graphs.

    A graph's code is generated for them, but its key (torch 2.13) is the same on another processor
    that shares the cache, or under ATEN_CPU_CAPABILITY: one then runs code whose vectors have
    another length, with wrong numbers and no word. Inductor's configuration is in the key.
    """
    from torch._inductor import config, cpu_vec_isa

    if config.cpp.simdlen is None:
        isa = cpu_vec_isa.pick_vec_isa()
        config.cpp.simdlen = isa.bit_width() if isa else 0
