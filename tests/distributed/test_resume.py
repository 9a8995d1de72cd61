"""Checkpoints: into another layout exactly, in the same layout as if nothing had happened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_reference import FAMILIES, settings_of
from rank_cases import Trainer, trainer, whole
from rank_pool import RankPool

from tp_trainer.checkpoint.saving import Checkpoints
from tp_trainer.checkpoint.state import RunState
from tp_trainer.data import Cursor

STATE = RunState(3, epoch=0, offset=24, tokens=99, global_batch_size=8)


def checkpoints(made: Trainer, run_dir: str, keep_last: int = 2) -> Checkpoints:
    return Checkpoints(run_dir, keep_last, made.model.module, made.optimizer, made.mesh.device)


def everything(made: Trainer) -> dict[str, torch.Tensor] | None:
    """Every tensor of model and optimizer in full, on rank 0."""
    out = {}
    for name, parameter in made.model.module.named_parameters():
        out[name] = whole(parameter)
        for key, value in made.optimizer.state[parameter].items():
            out[f"{name}.{key}"] = whole(value)
    return out if dist.get_rank() == 0 else None


def save_after_three(settings: dict[str, Any], run_dir: str) -> dict[str, Any]:
    """Three steps, a checkpoint, three more steps."""
    made = trainer(settings)
    losses = [made.step() for _ in range(3)]
    path = checkpoints(made, run_dir).save(STATE)
    state = everything(made)
    return {
        "path": path,
        "state": state,
        "losses": losses + [made.step() for _ in range(3)],
        "end": everything(made),
    }


def restored(settings: dict[str, Any], run_dir: str, steps: int = 0) -> dict[str, Any]:
    """A run with other weights and another random state takes up the newest checkpoint."""
    made = trainer({**settings, "seed": 7})
    made.data = trainer(settings).data if steps else made.data  # the order of data is the run's own
    saves = checkpoints(made, run_dir)
    found, skipped = saves.newest()
    assert found is not None
    state = saves.restore(found)
    made.cursor = Cursor(state.epoch, state.offset)
    at_restore = everything(made)
    assert all(p.grad is None for p in made.model.parameters)
    return {
        "meta": state,
        "skipped": skipped,
        "state": at_restore,
        "losses": [made.step() for _ in range(steps)],
        "end": everything(made),
    }


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert set(one) == set(other)
    return [
        name
        for name in one
        if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])
    ]


SAVED = {"tp": 2, "dp": 2}
OTHERS = [
    {"tp": 2, "dp": 2},
    {"tp": 4, "dp": 1},
    {"tp": 1, "dp": 4},
    {"tp": 1, "dp": 1},
    {"tp": 2, "dp": 2, "dp_replicate": 2},
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "family",
    ["qwen2", "qwen2_tied", "odd_vocabulary_tied", "one_kv_head", "phi3", "olmo2", "gemma3_text"],
)
def test_another_layout_has_exactly_the_same_state(
    ranks: RankPool, tmp_path: Path, family: str
) -> None:
    run_dir = str(tmp_path / "run")
    before = ranks.run(
        4, save_after_three, settings_of(FAMILIES[family], parallelism=SAVED), run_dir
    )[0]
    assert before["path"] == f"{run_dir}/step_00000003"
    assert any(
        name.endswith(".exp_avg_sq") and value.any() for name, value in before["state"].items()
    )
    for layout in OTHERS:
        settings = settings_of(FAMILIES[family], parallelism=layout)
        after = ranks.run(layout["tp"] * layout["dp"], restored, settings, run_dir)[0]
        assert differing(before["state"], after["state"]) == [], layout
        assert after["meta"] == replace(STATE, world=4, device="cpu") and after["skipped"] == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", [{"tp": 2, "dp": 2}, {"tp": 1, "dp": 2}])
@pytest.mark.parametrize("family", ["qwen2", "qwen2_dropout"])
def test_the_same_layout_goes_on_bit_for_bit(
    ranks: RankPool, tmp_path: Path, family: str, layout: dict[str, int]
) -> None:
    settings, run_dir = settings_of(FAMILIES[family], parallelism=layout), str(tmp_path / "run")
    world = layout["tp"] * layout["dp"]
    whole_run = ranks.run(world, save_after_three, settings, run_dir)[0]
    resumed = ranks.run(world, restored, settings, run_dir, 3)[0]
    assert resumed["losses"] == whole_run["losses"][3:]
    assert differing(whole_run["end"], resumed["end"]) == []


def test_resume_in_another_layout_goes_on_with_the_same_losses(
    ranks: RankPool, tmp_path: Path
) -> None:
    run_dir = str(tmp_path / "run")
    whole_run = ranks.run(4, save_after_three, settings_of(FAMILIES["qwen2"], 2, 2), run_dir)[0]
    for tp, dp in ((4, 1), (1, 2)):
        resumed = ranks.run(tp * dp, restored, settings_of(FAMILIES["qwen2"], tp, dp), run_dir, 3)[
            0
        ]
        for got, expected in zip(resumed["losses"], whole_run["losses"][3:], strict=True):
            assert got == pytest.approx(expected, rel=1e-5)


def saves_five(settings: dict[str, Any], run_dir: str) -> None:
    made = trainer(settings)
    saves = checkpoints(made, run_dir)
    for step in range(1, 6):
        made.step()
        saves.save(replace(STATE, step=step))


def test_only_the_last_are_kept_and_damaged_ones_passed_over(
    ranks: RankPool, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = settings_of(FAMILIES["qwen2"], 1, 2)
    ranks.run(2, saves_five, settings, str(run_dir))
    assert sorted(each.name for each in run_dir.iterdir()) == ["step_00000004", "step_00000005"]
    shards = sorted((run_dir / "step_00000005").glob("*.distcp"))
    assert len(shards) == 2  # each rank its own
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    after = ranks.run(2, restored, settings, str(run_dir))[0]
    assert after["meta"].step == 4
    assert [each.split(" (")[0] for each in after["skipped"]] == ["step_00000005"] and shards[
        1
    ].name in after["skipped"][0]


def saves_twice(settings: dict[str, Any], run_dir: str) -> list[str]:
    made = trainer(settings)
    saves = checkpoints(made, run_dir)
    path = saves.save(replace(STATE, step=1))
    assert path == f"{run_dir}/step_00000001"
    before = {each.name: each.read_bytes() for each in Path(path).iterdir()}
    dist.barrier()
    made.step()
    assert saves.save(replace(STATE, step=1)) == path, "it counts as saved"
    assert {each.name: each.read_bytes() for each in Path(path).iterdir()} == before
    assert [each.name for each in Path(run_dir).iterdir()] == ["step_00000001"]
    return [note for each in saves.done() for note in each.notes]


def test_a_whole_checkpoint_is_never_overwritten(ranks: RankPool, tmp_path: Path) -> None:
    notes = ranks.run(2, saves_twice, settings_of(FAMILIES["qwen2"], 1, 2), str(tmp_path))
    assert notes == [["step_00000001 is there already, and whole: it is kept as it is"]] * 2
