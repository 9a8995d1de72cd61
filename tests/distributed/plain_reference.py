"""What the trainer is held against: transformers, torch and one process. Of tp_trainer it knows
config and data only.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tp_trainer.config import load
from tp_trainer.data import Cursor, DataStream, open_data

SEQ, VOCAB = 64, 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.05,
}
LATENT: dict[str, Any] = {  # multi-head latent attention; it knows no key/value heads
    "num_key_value_heads": 8,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", **SIZES},
    "qwen2_tied": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", **SIZES},
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": 24},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 16},
    "llama_biases": {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True},
    "llama3_rope": {
        "model_type": "llama",
        **SIZES,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "yarn": {
        "model_type": "qwen3",
        **SIZES,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "dynamic": {
        "model_type": "llama",
        **SIZES,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "longrope": {
        "model_type": "phi3",
        **SIZES,
        "pad_token_id": 0,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.5, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 32,
        },
    },
    "one_kv_head": {"model_type": "llama", **SIZES, "num_key_value_heads": 1},
    "two_kv_heads": {"model_type": "qwen2", **SIZES, "num_key_value_heads": 2},
    "odd_vocabulary": {"model_type": "qwen2", **SIZES, "vocab_size": 509},
    "odd_vocabulary_tied": {
        "model_type": "qwen2",
        **SIZES,
        "vocab_size": 509,
        "tie_word_embeddings": True,
    },
    "nine_heads": {
        "model_type": "llama",
        **SIZES,
        "vocab_size": 512,
        "hidden_size": 72,
        "intermediate_size": 96,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "smollm3": {"model_type": "smollm3", **SIZES, "no_rope_layers": [1, 0], "pad_token_id": 0},
    "gemma": {"model_type": "gemma", **SIZES, "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2",
        **SIZES,
        "head_dim": 16,
        "sliding_window": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 32,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **SIZES,
        "head_dim": 16,
        "sliding_window": 24,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {"model_type": "phi3", **SIZES, "pad_token_id": 0, "sliding_window": 24},
    "phi3_kv2": {"model_type": "phi3", **SIZES, "pad_token_id": 0, "num_key_value_heads": 2},
    "olmo2": {"model_type": "olmo2", **SIZES},
    "granite": {
        "model_type": "granite",
        **SIZES,
        "logits_scaling": 4.0,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
    },
    "glm4": {
        "model_type": "glm4",
        **SIZES,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "pad_token_id": 0,
    },
    "cohere2": {
        "model_type": "cohere2",
        **SIZES,
        "sliding_window": 24,
        "logit_scale": 0.25,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
    },
    # as Jais 2, Nemotron and Arcee have it, an MLP without a gate
    "apertus": {"model_type": "apertus", **SIZES, "bos_token_id": 0, "eos_token_id": 1},
    "arcee": {"model_type": "arcee", **SIZES, "attention_bias": True, "mlp_bias": True},
    "cohere": {"model_type": "cohere", **SIZES, "logit_scale": 0.25, "pad_token_id": 0},
    "cohere_compass_text": {
        "model_type": "cohere_compass_text",
        **SIZES,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
        "sliding_window": 24,
        "logit_scale": 0.25,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "cwm": {
        "model_type": "cwm",
        **SIZES,
        "sliding_window": 24,
        "layer_types": ["full_attention", "sliding_attention"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "ernie4_5": {"model_type": "ernie4_5", **SIZES, "head_dim": 16, "use_bias": True},
    "exaone4": {
        "model_type": "exaone4",
        **SIZES,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "glm": {
        "model_type": "glm",
        **SIZES,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "pad_token_id": 0,
    },
    "helium": {"model_type": "helium", **SIZES, "head_dim": 8, "attention_bias": True},
    "hunyuan_v1_dense": {
        "model_type": "hunyuan_v1_dense",
        **SIZES,
        "head_dim": 16,
        "attention_bias": True,
        "pad_token_id": 0,
    },
    "hyperclovax": {
        "model_type": "hyperclovax",
        **SIZES,
        "pad_token_id": 0,
        "logits_scaling": 0.25,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.2,
    },
    "internlm3": {"model_type": "internlm3", **SIZES, "qkv_bias": True, "bias": True},
    "iquestcoder": {"model_type": "iquestcoder", **SIZES, "attention_bias": True},
    "jais2": {"model_type": "jais2", **SIZES, "head_dim": 16, "layer_norm_eps": 1e-3},
    "minicpm3": {
        "model_type": "minicpm3",
        **SIZES,
        **LATENT,
        "scale_emb": 6,
        "scale_depth": 0.7,
        "dim_model_base": 16,
    },
    "ministral": {
        "model_type": "ministral",
        **SIZES,
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "ministral3": {"model_type": "ministral3", **SIZES, "sliding_window": 24},
    "nanochat": {"model_type": "nanochat", **SIZES, "final_logit_softcapping": 3.0},
    "nemotron": {
        "model_type": "nemotron",
        **SIZES,
        "head_dim": 16,
        "norm_eps": 1e-3,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "mlp_bias": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    # at the clip a gradient jumps: of 2.6 million values in 20 steps some 400 are beyond it, and
    # none within 3e-5 of it, so that no rounding moves one across
    "olmo": {"model_type": "olmo", **SIZES, "clip_qkv": 1.4932, "pad_token_id": 0},
    "olmo3": {
        "model_type": "olmo3",
        **SIZES,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
    },
    "phi": {
        "model_type": "phi",
        **SIZES,
        "layer_norm_eps": 1e-3,
        "qk_layernorm": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    },
    "apertus1p5_text": {"model_type": "apertus1p5_text", **SIZES, "pad_token_id": 0},
    "exaone": {"model_type": "exaone", **SIZES, "bos_token_id": 0, "eos_token_id": 1},
    "gpt_neox": {
        "model_type": "gpt_neox",
        **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
        "layer_norm_eps": 1e-3,
    },
    "gpt_neox_serial": {
        "model_type": "gpt_neox",
        **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
        "use_parallel_residual": False,
        "attention_bias": False,
    },
    "lfm2": {
        "model_type": "lfm2",
        **SIZES,
        "layer_types": ["conv", "full_attention"],
        "conv_bias": True,
        "block_multiple_of": 8,
        "tie_word_embeddings": False,
    },
    "qwen3_5_text": {
        "model_type": "qwen3_5_text",
        **SIZES,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "seed_oss": {
        "model_type": "seed_oss",
        **SIZES,
        "head_dim": 16,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
    "starcoder2": {
        "model_type": "starcoder2",
        **SIZES,
        "sliding_window": 24,
        "norm_epsilon": 1e-3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "vaultgemma": {
        "model_type": "vaultgemma",
        **SIZES,
        "head_dim": 16,
        "sliding_window": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
    "youtu": {"model_type": "youtu", **SIZES, **LATENT, "tie_word_embeddings": False},
    "qwen2_dropout": {"model_type": "qwen2", **SIZES, "attention_dropout": 0.2},
}

# each family with all of it at once: fewer key/value heads than tp, a vocabulary that tp doesn't
# divide, a tied head
KV = "num_key_value_heads"
AWKWARD: dict[str, Any] = {KV: 2, "vocab_size": 509, "tie_word_embeddings": True}
# that the installed transformers has, with a tensor-parallel plan
TYPES = [
    name
    for name, each in FAMILIES.items()
    if each["model_type"] == name
    and name in CONFIG_MAPPING
    and CONFIG_MAPPING[name].base_model_tp_plan
]
FAMILIES |= {
    f"{name}_awkward": {
        **FAMILIES[name],
        **{key: value for key, value in AWKWARD.items() if key != KV or KV in FAMILIES[name]},
        **({KV: 8} if "kv_lora_rank" in FAMILIES[name] else {}),
    }
    for name in TYPES
}


def plain_model(architecture: dict[str, Any], seed: int = 0) -> Any:
    """transformers' model on the CPU; biases and norms are no longer 0 and 1, so that they can't be
    swapped unseen.
    """
    fields = {key: value for key, value in architecture.items() if key != "model_type"}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture["model_type"], **fields), attn_implementation="eager"
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        if name.endswith("A_log"):  # Qwen3.5's: drawn, most heads forget within a token, and of
            parameter.data.sub_(2)  # its gradient little but rounding is left
    for name, buffer in model.named_buffers():
        if name.endswith("act_fn.eps"):  # Apertus': within it of zero rounding decides the slope
            buffer.zero_()
    return model


def saved(directory: Path, family: str) -> str:
    """A directory with the weights of one of FAMILIES."""
    path = directory / family
    if not path.exists():
        plain_model(FAMILIES[family]).save_pretrained(path)
    return str(path)


def settings_of(
    model: str | dict[str, Any], tp: int = 1, dp: int = 1, **groups: dict[str, Any]
) -> dict[str, Any]:
    """A run's settings as a plain dictionary: random tokens, 8 sequences a step in micro-batches of
    2, AdamW at a constant rate.

    Args:
        model: a directory with weights, or the architecture of a model with random ones.
    """
    own = (
        {"name": model, "weights": "pretrained"}
        if isinstance(model, str)
        else {"architecture": model}
    )
    values: dict[str, Any] = {
        "experiment_name": "test",
        "model": own,
        "parallelism": {"tp": tp, "dp": dp},
        "data": {"source": "random", "seq_length": SEQ},
        "optim": {
            "lr": 1e-3,
            "weight_decay": 0.1,
            "schedule": "constant",
            "warmup_steps": 0,
            "eps": 1e-6,
        },
        "train": {
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "max_steps": 10,
            "clip_grad_norm": 0.1,
        },
    }
    for group, changes in groups.items():
        values[group] = {**values.get(group, {}), **changes}
    return values


def data_of(settings: dict[str, Any], dp_rank: int = 0, dp_size: int = 1) -> DataStream:
    return open_data(
        load(settings),
        tokenizer="none",
        dp_rank=dp_rank,
        dp_size=dp_size,
        first_on_node=lambda make: make(),
    )


def global_batches(settings: dict[str, Any], steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each step's whole batch: inputs and labels, int64 [global_batch_size, seq]."""
    stream, cursor, out = data_of({**settings, "parallelism": {"tp": 1, "dp": 1}}), Cursor(), []
    for _ in range(steps):
        parts, cursor = stream.step(cursor)
        out.append(
            (
                torch.cat([part.input_ids for part in parts]),
                torch.cat([part.labels for part in parts]),
            )
        )
    return out


def mask_labels(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Labels of which some don't count: none, a quarter, half or three quarters of a row's, as its
    first token says.
    """
    kept = inputs[:, :1] % 4 * (labels.shape[1] // 4)
    return torch.where(torch.arange(labels.shape[1])[None] < kept, labels, -100)


def is_decayed(parameter: torch.Tensor) -> bool:
    """Vectors have no weight decay: norms, biases, the decays of recurrent layers."""
    return parameter.ndim >= 2


class Reference:
    """One process, one model, one batch."""

    def __init__(self, settings: dict[str, Any]) -> None:
        optim = load({**settings, "parallelism": {"tp": 1, "dp": 1}}).optim
        name = settings["model"]["name"]
        self.model = AutoModelForCausalLM.from_pretrained(
            name, attn_implementation="eager", dtype=torch.float32
        ).train()
        self.clip = settings["train"]["clip_grad_norm"]
        self.gradients: dict[str, torch.Tensor] = {}  # of the first step, unclipped
        named = list(self.model.named_parameters())
        groups = [
            {"params": [p for _, p in named if is_decayed(p)], "weight_decay": optim.weight_decay},
            {"params": [p for _, p in named if not is_decayed(p)], "weight_decay": 0.0},
        ]
        assert optim.lr
        self.optimizer = torch.optim.AdamW(
            groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps
        )

    def loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean over all labels that count."""
        logits = self.model(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)

    def exact_gradients(
        self, inputs: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Unclipped, in float64 as far as transformers goes along (norms are float32)."""
        exact = copy.deepcopy(self.model).double()
        logits = exact(input_ids=inputs, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
        return {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}

    def step(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
        loss = self.loss(inputs, labels)
        loss.backward()
        self.gradients = self.gradients or {
            name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None
        }
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), float(norm)

    def run(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
        losses, norms = zip(*(self.step(*batch) for batch in batches), strict=True)
        parameters = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        return {
            "losses": losses,
            "norms": norms,
            "gradients": self.gradients,
            "parameters": parameters,
        }
