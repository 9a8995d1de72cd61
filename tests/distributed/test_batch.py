"""A batch's positions and documents, whole logits, frozen parameters: as in plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain_reference import FAMILIES, SEQ, TYPES, Reference, global_batches, saved, settings_of
from rank_cases import run_steps, trainer, whole
from rank_pool import RankError, RankPool
from transformers import AutoModelForCausalLM

from tp_trainer.batch import IGNORE_INDEX, Batch
from tp_trainer.models.families import RECORDS, Family

DOCUMENTS = ([20, 44], [64], [7, 30, 27], [63, 1])  # tokens of each, in rows of SEQ


def packed(vocab_size: int = 509) -> Batch:
    """Rows of several documents with positions of their own; nothing follows a document's end."""
    ids = torch.randint(
        vocab_size, (len(DOCUMENTS), SEQ), generator=torch.Generator().manual_seed(3)
    )
    labels = torch.roll(ids, -1, dims=1)
    for row, lengths in zip(labels, DOCUMENTS, strict=True):
        row[torch.tensor(lengths).cumsum(0) - 1] = IGNORE_INDEX
    positions = [torch.cat([torch.arange(each) for each in lengths]) for lengths in DOCUMENTS]
    documents = [
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        for lengths in DOCUMENTS
    ]
    return Batch(ids, labels, torch.stack(positions), torch.stack(documents))


def plain(directory: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).train()


def passed(settings: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """The mean loss and the gradients of a batch, whose rows the data ranks share."""
    made = trainer(settings)
    data, share = made.mesh.data, len(batch.labels) // made.mesh.data.size
    count = batch.count_labels().float()
    own = batch.rows(data.rank * share, (data.rank + 1) * share)
    loss = made.model.forward_backward([own], count)
    data.all_reduce(loss)
    gradients = {
        name: whole(parameter.grad)
        for name, parameter in made.model.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": loss.item(), "gradients": gradients}


KEPT_APART = [name for name in TYPES if RECORDS.get(name, Family(name)).passes_documents]


@pytest.mark.families
@pytest.mark.sampled(6)
@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("family", [*KEPT_APART, "dynamic", "longrope"])
def test_positions_that_restart(
    ranks: RankPool, models: Path, family: str, layout: tuple[int, int]
) -> None:
    """transformers keeps documents apart where positions restart, and so do we."""
    directory, batch = saved(models, family), packed()
    got = ranks.run(layout[0] * layout[1], passed, settings_of(directory, *layout), batch)[0]
    model = plain(directory)
    given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    logits = model(**given, use_cache=False).logits.float()
    labels = batch.labels.flatten()
    loss = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORE_INDEX)
    loss.backward()
    assert got["loss"] == pytest.approx(loss.item(), rel=1e-6)
    apart = model(input_ids=batch.input_ids, use_cache=False).logits.float()
    assert (apart - logits).abs().max() > 1e-2, "the documents make no difference: nothing is shown"
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            got["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6 * parameter.grad.norm()
        )


def logits_of(settings: dict[str, Any], batch: Batch) -> torch.Tensor:
    made = trainer(settings)
    found = made.model.logits(batch)
    assert made.model.module.training
    return found


@pytest.mark.skipif("nemotron" not in TYPES, reason="an older transformers")
def test_a_family_that_cannot_keep_documents_apart_says_so(ranks: RankPool, models: Path) -> None:
    settings = settings_of(saved(models, "nemotron"))
    with pytest.raises(RankError, match="nemotron can't keep the documents of a row apart"):
        ranks.run(1, passed, settings, packed())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", [(2, 1), (4, 1), (1, 2)], ids=str)
@pytest.mark.parametrize(
    "family", ["qwen2", "gemma2_awkward", "granite_awkward", "cohere2", "phi3"]
)
def test_logits(ranks: RankPool, models: Path, family: str, layout: tuple[int, int]) -> None:
    directory, batch = saved(models, family), packed()
    found = ranks.run(layout[0] * layout[1], logits_of, settings_of(directory, *layout), batch)
    with torch.no_grad():
        given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        wanted = plain(directory).eval()(**given, use_cache=False).logits
    assert wanted.shape[-1] == FAMILIES[family]["vocab_size"]
    for each in found:
        torch.testing.assert_close(each, wanted, rtol=1e-5, atol=1e-5)


def is_trained(name: str) -> bool:
    """Half of the model: the second layer, and of the first one what isn't its MLP."""
    return "layers.1." in name or ("layers.0." in name and "mlp" not in name)


def half_frozen(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    return run_steps(settings, steps, trainable=is_trained)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "phi3", "odd_vocabulary_tied"])
def test_frozen_parameters(
    ranks: RankPool, models: Path, family: str, layout: tuple[int, int]
) -> None:
    settings = settings_of(saved(models, family), *layout)
    got = ranks.run(layout[0] * layout[1], half_frozen, settings, 4)[0]
    reference = Reference(settings)
    before = {name: p.detach().clone() for name, p in reference.model.named_parameters()}
    for name, parameter in reference.model.named_parameters():
        parameter.requires_grad_(is_trained(name))
    wanted = reference.run(global_batches(settings, 4))
    assert got["losses"] == pytest.approx(wanted["losses"], rel=1e-6)
    assert got["norms"] == pytest.approx(wanted["norms"], rel=1e-5)
    assert set(got["gradients"]) == {name for name in before if is_trained(name)}
    for name, parameter in wanted["parameters"].items():
        if is_trained(name):
            torch.testing.assert_close(got["parameters"][name], parameter, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(got["parameters"][name], before[name])


def kept_of_frozen(settings: dict[str, Any]) -> dict[str, Any]:
    """What a model in bfloat16 holds of its frozen parameters."""
    made = trainer(settings, trainable=is_trained)
    made.step()
    groups = made.model.parameter_groups()
    moments = {id(each) for each in made.optimizer.state}
    return {
        "dtypes": {str(each.dtype) for each in groups.frozen.values()},
        "trained": {str(each.dtype) for each in (*groups.matrix.values(), *groups.vector.values())},
        "gradients": [name for name, each in groups.frozen.items() if each.grad is not None],
        "moments": [name for name, each in groups.frozen.items() if id(each) in moments],
        "hooks": [name for name, each in groups.frozen.items() if each._post_accumulate_grad_hooks],
        "in_the_norm": [
            name
            for name, each in groups.frozen.items()
            if any(each is other for other in made.model.parameters)
        ],
        "frozen": sorted(groups.frozen),
    }


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=str)
def test_frozen_parameters_cost_nothing_but_themselves(
    ranks: RankPool, models: Path, layout: tuple[int, int]
) -> None:
    settings = settings_of(saved(models, "qwen2"), *layout)
    settings["parallelism"] |= {"param_dtype": "bfloat16"}
    held = ranks.run(layout[0] * layout[1], kept_of_frozen, settings)[0]
    assert held["dtypes"] == {"torch.bfloat16"} and held["trained"] == {"torch.float32"}
    assert held["frozen"] and "model.layers.0.mlp.up_proj.weight" in held["frozen"]
    for kind in ("gradients", "moments", "hooks", "in_the_norm"):
        assert held[kind] == [], kind
