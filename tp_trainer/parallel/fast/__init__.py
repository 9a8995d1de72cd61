"""The fast paths: each replaces a part of the plain path next door by something quicker that gives
the same numbers (float8: nearly). The plain path is complete without this room; which of them a
run takes is decided once, in `FastPaths.choose`.
"""

from tp_trainer.parallel.fast.choice import HOLDING, FastPaths
from tp_trainer.parallel.fast.memory import Memory

__all__ = ["HOLDING", "FastPaths", "Memory", "close"]


def close() -> None:
    """Give up the memory that ranks share; to be called before their process groups end."""
    from tp_trainer.parallel.fast import async_tp_ops, symmetric_memory

    async_tp_ops.close()
    symmetric_memory.close_all()
