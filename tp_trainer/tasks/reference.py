"""What task=verify holds the trainer against: transformers, torch and one process. Of tp_trainer it
knows config and data only.

Precision: parameters and AdamW's moments are float32. Under a lower compute dtype the forward and
    backward pass run
with a cast copy of the parameters (what FSDP2's mixed precision does too), and gradients arrive and
add up in float32. Under float64 the products and sums are; norms, softmax and rotary angles stay
float32, as transformers has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tp_trainer.batch import IGNORE_INDEX
from tp_trainer.config import Config
from tp_trainer.data import Cursor, open_data


class Reference:
    """One process, the whole model, the whole global batch."""

    def __init__(
        self,
        config: Config,
        weights: Path,
        tokenizer: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`weights`: safetensors files that hold every parameter, by its name in transformers'
        model.
        """
        fields = {
            key: value
            for key, value in config.model.architecture.items()
            if key not in ("model_type", "torch_dtype", "dtype")
        }
        numbers = AutoConfig.for_model(config.model.architecture["model_type"], **fields)
        with torch.device(device):
            self.model: Any = AutoModelForCausalLM.from_config(
                numbers, attn_implementation="eager", dtype=torch.float32
            )
        self.model.train()
        self.parameters: dict[str, torch.nn.Parameter] = dict(self.model.named_parameters())
        self.dtype, self.device = dtype, device
        self._load(weights)
        self.data = open_data(
            config, tokenizer=tokenizer, dp_rank=0, dp_size=1, first_on_node=lambda make: make()
        )
        self.cursor = Cursor()
        self.clip_grad_norm = config.train.clip_grad_norm
        optim = config.optim
        assert optim.schedule == "constant" and optim.warmup_steps == 0
        groups = [
            {
                "params": [p for p in self.parameters.values() if is_decayed(p)],
                "weight_decay": optim.weight_decay,
            },
            {
                "params": [p for p in self.parameters.values() if not is_decayed(p)],
                "weight_decay": 0.0,
            },
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps
        )

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
        """The next step's mean loss over all label tokens; the gradients are left in the
        parameters, unclipped.
        """
        batches, self.cursor = self.data.step(self.cursor)
        count = sum(int(batch.count_labels()) for batch in batches)
        total = 0.0
        for batch in batches:
            given = batch.to(self.device)
            cast = {name: parameter.to(self.dtype) for name, parameter in self.parameters.items()}
            logits = torch.func.functional_call(
                self.model,
                cast,
                (),
                {
                    "input_ids": given.input_ids,
                    "position_ids": given.position_ids,
                    "use_cache": False,
                },
            ).logits
            wide = logits.to(torch.promote_types(self.dtype, torch.float32)).flatten(0, 1)
            labels = given.labels.flatten()
            loss = F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum") / count
            loss.backward()
            total += loss.item()
        return total

    def update(self) -> float:
        """Clip, step the optimizer, forget the gradients. Returns the norm before clipping."""
        # clip_grad_norm_ in two steps, since its own norm is off by up to 4e-3 on the CPU, where
        # torch sums in float32
        parts = [
            torch.linalg.vector_norm(p.grad, dtype=torch.float64)
            for p in self.parameters.values()
            if p.grad is not None
        ]
        norm = torch.stack(parts).norm()
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(
                self.parameters.values(), self.clip_grad_norm, norm.float()
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()


def is_decayed(parameter: torch.Tensor) -> bool:
    """Vectors have no weight decay: norms, biases, the decays of recurrent layers."""
    return parameter.ndim >= 2
