"""The record of a family: what the product knows of it beyond transformers' own plan and config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tp_trainer.parallel.tensor import Role

Projection = Literal["queries", "keys", "inner"]
"""What a linear that holds several projections holds: query heads, key or value heads, or the
MLP's inner features."""

COMMON = frozenset(
    {
        "attention_bias",
        "attention_dropout",
        "head_dim",
        "hidden_act",
        "hidden_activation",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "mlp_bias",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "rms_norm_eps",
        "rope_parameters",
        "sliding_window",
        "tie_word_embeddings",
        "use_sliding_window",
        "vocab_size",
    }
)
"""Config fields that are honoured in every family whose config class has them."""

HARMLESS = frozenset(
    {
        "architectures",
        "bos_token_id",
        "dtype",
        "eod_token_id",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",
        "problem_type",
        "tie_last_hidden_states",
        "transformers_version",
        "use_cache",
    }
)
"""Config fields that may have any value: no logit depends on them."""


@dataclass(frozen=True)
class Family:
    """What is special about a family of transformers models. Where the tensor-parallel plan that
    transformers keeps beside its config says all, the model type alone is a whole record.

    Modules are named as in that plan, e.g. `layers.*.mlp.down_proj`.
    """

    model_type: str
    # what a module is, where the plan leaves it out or would compute more than its part on each
    # rank
    roles: Mapping[str, Role] = field(default_factory=dict)
    # linears of several projections -> those, in the order of their output features
    fused: Mapping[str, tuple[Projection, ...]] = field(default_factory=dict)
    # config fields: logits are multiplied by, divided by, squashed to +- their value
    logit_factor: str | None = None
    logit_divisor: str | None = None
    logit_softcap: str | None = None
    # buffers that the embedding is multiplied by -> the attribute that holds the same value
    scales: Mapping[str, str] = field(default_factory=dict)
    layer_types: tuple[str, ...] = ("full_attention", "sliding_attention")  # that it may have
    # whether its layers hand the attention a batch's document_ids
    passes_documents: bool = True
    # parts of its tensors' names in files -> those in the model
    stored: Mapping[str, str] = field(default_factory=dict)
    # modules of optional kernels that transformers uses where they are there -> their packages
    kernels: Mapping[str, str] = field(default_factory=dict)
    # config fields that the forward reads, and that are honoured besides COMMON
    honoured: frozenset[str] = frozenset()

    @property
    def replicates_keys(self) -> bool:
        """Whether a key/value head may be on several ranks: not where a norm spans all heads."""
        return Role.NORM not in self.roles.values()

    def own_name(self, stored: str) -> str:
        """The model's name of a tensor, from the one in files."""
        for theirs, ours in self.stored.items():
            stored = stored.replace(theirs, ours)
        return stored

    def stored_name(self, own: str) -> str:
        """The name that a tensor of the model has in files."""
        for theirs, ours in reversed(list(self.stored.items())):
            own = own.replace(ours, theirs)
        return own

    def lets_through(self, name: str) -> bool:
        """Whether a config field of the family may have any value that transformers takes."""
        logits = (self.logit_factor, self.logit_divisor, self.logit_softcap)
        return name in COMMON | HARMLESS | self.honoured or name in logits
