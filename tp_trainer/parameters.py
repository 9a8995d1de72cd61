"""A model's parameters by kind, as optimizers see them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ParameterGroups:
    """Parameters, each by its name; a tied one is there once."""

    matrix: dict[str, nn.Parameter] = field(default_factory=dict)  # of linears inside the blocks
    table: dict[str, nn.Parameter] = field(default_factory=dict)  # embedding and head
    vector: dict[str, nn.Parameter] = field(default_factory=dict)  # norms, biases and the like
    frozen: dict[str, nn.Parameter] = field(default_factory=dict)  # without a gradient, of any kind

    @classmethod
    def of(cls, model: Any) -> ParameterGroups:
        """Of a transformers causal language model, on a mesh or plain."""
        groups = cls()
        ends = model.get_input_embeddings(), model.get_output_embeddings()
        tables = {id(each.weight) for each in ends}
        for name, parameter in model.named_parameters():
            kind = "vector" if parameter.ndim < 2 else "matrix"
            kind = "table" if id(parameter) in tables else kind
            kind = kind if parameter.requires_grad else "frozen"
            getattr(groups, kind)[name] = parameter
        return groups
