"""What task=verify holds the trainer against: transformers, torch and one process. Of tp_trainer it knows config and data only.

Precision: parameters and AdamW's moments are float32. Under a lower compute dtype the forward and backward pass run
with a cast copy of the parameters (what FSDP2's mixed precision does too), and gradients arrive and add up in float32.
Under float64 the products and sums are; norms, softmax and rotary angles stay float32, as transformers has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tp_trainer.config import Config
from tp_trainer.data import IGNORE_INDEX, Cursor, open_data


class Reference:
    """One process, the whole model, the whole global batch."""

    def __init__(self, config: Config, weights: Path, tokenizer: str, dtype: torch.dtype, device: torch.device) -> None:
        """`weights`: safetensors files that hold every parameter, by its name in transformers' model."""
        fields = {key: value for key, value in config.model.architecture.items() if key not in ("model_type", "torch_dtype", "dtype")}
        numbers = AutoConfig.for_model(config.model.architecture["model_type"], **fields)
        with torch.device(device):
            self.model: Any = AutoModelForCausalLM.from_config(numbers, attn_implementation="eager", dtype=torch.float32)
        self.model.train()
        self.parameters: dict[str, torch.nn.Parameter] = dict(self.model.named_parameters())
        self.dtype, self.device = dtype, device
        self._load(weights)
        self.data = open_data(config, tokenizer=tokenizer, dp_rank=0, dp_size=1, first_on_node=lambda make: make())
        self.cursor = Cursor()
        self.clip_grad_norm = config.train.clip_grad_norm
        optim = config.optim
        assert optim.lr is not None and optim.schedule == "constant" and optim.warmup_steps == 0
        groups = [
            {"params": [p for n, p in self.parameters.items() if is_decayed(n)], "weight_decay": optim.weight_decay},
            {"params": [p for n, p in self.parameters.items() if not is_decayed(n)], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps)

    @torch.no_grad()
    def _load(self, weights: Path) -> None:
        empty = dict(self.parameters)
        for file in sorted(weights.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                parameter = empty.pop(name)
                assert parameter.shape == tensor.shape, (name, parameter.shape, tensor.shape)
                parameter.copy_(tensor)
        assert not empty, f"no weights for {', '.join(empty)}"

    def backward(self) -> float:
        """The next step's mean loss over all label tokens; the gradients are left in the parameters, unclipped."""
        batches, self.cursor = self.data.step(self.cursor)
        count = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            ids, labels = batch["input_ids"].to(self.device), batch["labels"].to(self.device)
            cast = {name: parameter.to(self.dtype) for name, parameter in self.parameters.items()}
            logits = torch.func.functional_call(self.model, cast, (), {"input_ids": ids, "use_cache": False}).logits
            wide = logits.to(torch.promote_types(self.dtype, torch.float32)).flatten(0, 1)
            loss = F.cross_entropy(wide, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum") / count
            loss.backward()
            total += loss.item()
        return total

    def update(self) -> float:
        """Clip, take the optimizer's step, forget the gradients. Returns the norm before clipping."""
        # clip_grad_norm_ in two steps, since its own norm is off by up to 4e-3 on the CPU, where torch sums in float32
        parts = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in self.parameters.values() if p.grad is not None]
        norm = torch.stack(parts).norm()
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip_grad_norm, norm.float())
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()


def is_decayed(name: str) -> bool:
    """Norms and biases have no weight decay."""
    return not (name.endswith("bias") or "norm" in name)
