"""What the smallest run says of itself."""

from __future__ import annotations

from typing import Any

TINY_RUN: dict[str, Any] = {
    "experiment_name": "tiny-run",
    "model": {
        "architecture": {
            "model_type": "llama",
            "vocab_size": 4096,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128,
        }
    },
}
