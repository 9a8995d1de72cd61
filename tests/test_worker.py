"""worker.restore: what a checkpoint must fit before anything of it is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from tp_trainer.checkpoint.store import Found
from tp_trainer.config import ConfigError, load
from tp_trainer.worker import restore


class Checkpoints:
    """One checkpoint, of a run on the tokens `b`."""

    def __init__(self) -> None:
        self.restored = False

    def newest(self, launch: str | None) -> tuple[Found, list[str]]:
        return Found(7, "there/step_00000007", {"epoch": 0, "offset": 56, "tokens": 99, "data": "b"}), []

    def restore(self, found: Found) -> dict[str, Any]:
        self.restored = True
        return found.state


def test_other_tokens_are_refused_before_anything_is_loaded() -> None:
    architecture = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 128}  # fmt: skip
    config = load({"experiment_name": "x", "model": {"architecture": architecture}, "data": {"seq_length": 64}})
    saves: Any = Checkpoints()
    with pytest.raises(ConfigError, match="other tokens than there/step_00000007"):
        restore(config, "now", saves, 10, "a")
    assert not saves.restored
    position, found, _ = restore(config, "now", saves, 10, "b")
    assert saves.restored and found is not None and (position.step, position.cursor.offset, position.tokens) == (7, 56, 99)
