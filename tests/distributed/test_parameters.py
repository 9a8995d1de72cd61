"""What a built model is: transformers' class and names, split over (dp, tp), tied where tied, drawn
the same in every layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_reference import FAMILIES, is_decayed, plain_model, saved, settings_of
from rank_cases import trainer, whole_parameters
from rank_pool import RankError, RankPool
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM


def built(settings: dict[str, Any]) -> dict[str, torch.Tensor] | None:
    return whole_parameters(trainer(settings).model)


def digest(parameters: dict[str, torch.Tensor]) -> dict[str, tuple[float, float, float]]:
    return {
        name: (p.mean().item(), p.std().item(), p.abs().max().item())
        for name, p in parameters.items()
    }


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "family",
    ["qwen2", "qwen2_tied", "qwen3", "odd_vocabulary", "phi3", "gemma2", "olmo2", "one_kv_head"],
)
def test_random_weights_do_not_depend_on_the_layout(ranks: RankPool, family: str) -> None:
    one = ranks.run(1, built, settings_of(FAMILIES[family]))[0]
    for layout in (
        {"tp": 2, "dp": 2},
        {"tp": 4, "dp": 1},
        {"tp": 2, "dp": 2, "dp_replicate": 2},
        {"tp": 1, "dp": 2},
    ):
        other = ranks.run(
            layout["tp"] * layout["dp"], built, settings_of(FAMILIES[family], parallelism=layout)
        )[0]
        assert list(other) == list(one)
        assert [name for name in one if not torch.equal(one[name], other[name])] == [], layout


def test_random_weights_are_the_familys(ranks: RankPool) -> None:
    """As transformers would draw them: normal with initializer_range, norms 1, biases 0."""
    architecture = {**FAMILIES["qwen2"], "initializer_range": 0.03}
    got = ranks.run(4, built, settings_of(architecture, 2, 2))[0]
    torch.manual_seed(1)
    fields = {key: value for key, value in architecture.items() if key != "model_type"}
    plain = digest(
        dict(
            AutoModelForCausalLM.from_config(
                AutoConfig.for_model("qwen2", **fields)
            ).named_parameters()
        )
    )
    for name, (mean, std, largest) in digest(got).items():
        if is_decayed(got[name]):
            count = got[name].numel()
            assert (
                std == pytest.approx(0.03, rel=5 / (2 * count) ** 0.5)
                and abs(mean) < 5 * 0.03 / count**0.5
            ), name
            assert 3 * 0.03 < largest < 6 * 0.03, name  # normal, not uniform
            assert std == pytest.approx(plain[name][1], rel=0.1), name
        else:
            assert got[name].eq(1.0 if "norm" in name else 0.0).all() and (mean, largest) == (
                plain[name][0],
                plain[name][2],
            ), name
    drawn = [got[name].flatten()[:64] for name in got if is_decayed(got[name])]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i]), (
        "two parameters with the same draws"
    )


def test_random_weights_differ_by_seed(ranks: RankPool) -> None:
    settings = settings_of(FAMILIES["qwen2"], 2, 1)
    one, same, other = (ranks.run(2, built, {**settings, "seed": seed})[0] for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if is_decayed(one[name]))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pretrained_weights_are_the_files(
    ranks: RankPool, tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    """From several files with an index, whatever they are stored in; in float32 here."""
    plain = plain_model(FAMILIES[family]).to(dtype)
    plain.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    got = ranks.run(4, built, settings_of(str(tmp_path), 2, 2))[0]
    assert list(got) == list(dict(plain.named_parameters()))
    assert all(
        got[name].dtype == torch.float32 and torch.equal(got[name], p.float())
        for name, p in plain.named_parameters()
    )


def test_weights_of_another_architecture_are_refused(ranks: RankPool, models: Path) -> None:
    directory = saved(models, "llama")
    for overrides, sentence in (
        (
            {"num_hidden_layers": 3},
            r"missing: model\.layers\.2\.input_layernorm\.weight.* and \d+ more",
        ),
        (
            {"num_hidden_layers": 1},
            r"unexpected: model\.layers\.1\.input_layernorm\.weight.* and \d+ more",
        ),
        ({"intermediate_size": 256}, r"mlp\.\w+\.weight has shape \[.*\], the model's is \[.*256"),
    ):
        settings = settings_of(directory, 2, 1)
        settings["model"]["overrides"] = overrides
        with pytest.raises(RankError, match=f"ConfigError: model.name=.*{sentence}"):
            ranks.run(2, built, settings)


def structure(settings: dict[str, Any]) -> dict[str, Any]:
    made = trainer(settings)
    model = made.model.module
    made.step()
    lie = {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        lie[name] = (
            parameter.device_mesh.mesh_dim_names,
            tuple(parameter.shape),
            tuple(parameter.to_local().shape),
        )
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return {
        "class": [each.__module__ + "." + each.__qualname__ for each in type(model).__mro__],
        "names": list(dict(model.named_parameters())),
        "states": list(model.state_dict()),
        "lie": lie,
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "tied": head is embedding and head.to_local().data_ptr() == embedding.to_local().data_ptr(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen2_tied", "llama", "mistral", "qwen3"])
def test_structure(ranks: RankPool, family: str) -> None:
    plain = plain_model(FAMILIES[family])
    for got in ranks.run(4, structure, settings_of(FAMILIES[family], 2, 2)):
        own = [f"{each.__module__}.{each.__qualname__}" for each in type(plain).__mro__]
        assert got["class"][2:] == own, "FSDP2 puts two of its own first, and that is all"
        assert got["names"] == list(dict(plain.named_parameters())) and got["states"] == list(
            plain.state_dict()
        )
        assert got["tied"] is (family == "qwen2_tied")
        assert set(got["buffers"]) == {name for name, _ in plain.named_buffers()}
        assert all(
            torch.equal(got["buffers"][name], buffer) for name, buffer in plain.named_buffers()
        )
        for name, parameter in plain.named_parameters():
            meshes, shape, mine = got["lie"][name]
            assert shape == tuple(parameter.shape)
            replicated = "norm" in name
            assert meshes == (("dp",) if replicated else ("dp", "tp")), name
            assert 4 // (2 if replicated else 1) * torch.Size(mine).numel() == parameter.numel(), (
                name
            )
            row = "o_proj" in name or "down_proj" in name
            if parameter.ndim == 2:  # split over tp by input features in row layers, else by rows
                assert mine == (
                    (shape[0] // 2, shape[1] // 2) if row else (shape[0] // 4, shape[1])
                ), name
