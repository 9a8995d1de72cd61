"""What a checkpoint knows of its run besides the tensors: the content of state.json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tp_trainer.checkpoint.manifest import STATE, Damaged, is_count, render

COUNTS = ("step", "epoch", "offset", "tokens", "global_batch_size")
"""What every state.json has: whole numbers, from 0."""


@dataclass(frozen=True)
class RunState:
    """A run at the end of a step, as state.json has it, key for key.

    Only the counts are always there: earlier releases wrote less of the others.
    """

    step: int  # optimizer steps done
    epoch: int  # of the data's cursor, with `offset`
    offset: int  # rows of the epoch that are done
    tokens: int  # label tokens trained on
    global_batch_size: int  # sequences a step
    data: str | None = None  # identity of the training tokens
    seq_length: int | None = None  # tokens a row
    seed: int | None = None
    launch: str | None = None  # the start of the program that made it
    layout: str | None = None  # of `parallelism`, e.g. tp2_dp2
    world: int | None = None  # ranks
    device: str | None = None  # torch's type: cuda, cpu
    validation_loss: float | None = None  # the last finite one, nats a token
    guard: dict[str, Any] = field(default_factory=dict)  # memory of optim.Guard
    schedule: dict[str, Any] | None = None  # fields of optim.Schedule

    def render(self) -> bytes:
        """The content of state.json."""
        return render(asdict(self))

    @classmethod
    def parse(cls, content: bytes, step: int) -> RunState:
        """From the content of the state.json of a checkpoint of that step. Keys of other releases
        are passed over. Raises Damaged."""
        try:
            state = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{STATE} is no JSON") from error
        if (
            not isinstance(state, dict)
            or not all(is_count(state.get(key)) for key in COUNTS)
            or state["step"] != step
        ):
            raise Damaged(f"{STATE} lacks one of {', '.join(COUNTS)}, or it is of another step")
        if not _is_finite(state.get("validation_loss")):
            state["validation_loss"] = None
        return cls(**{each.name: state[each.name] for each in fields(cls) if each.name in state})


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
