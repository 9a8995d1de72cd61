"""Steps whose numbers go wrong are skipped by all ranks together; a wish of one rank is fulfilled
by all of them.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_reference import FAMILIES, settings_of
from rank_cases import Trainer, trainer
from rank_pool import RankPool
from torch.distributed.tensor import DTensor

from tp_trainer.loop import Diverged, Hooks, Outcome, Position, train
from tp_trainer.optim import Guard
from tp_trainer.parallel.agreement import LEAVE, SAVE, STOP

QUIET = {
    "log_interval": 1,
    "eval_interval": None,
    "eval_batches": 1,
    "max_steps": 8,
    "drift_interval": None,
}


def settings_for(tp: int = 2, dp: int = 2, **train: Any) -> dict[str, Any]:
    return settings_of(
        FAMILIES["qwen2"], tp, dp, train={**QUIET, **train}, checkpoint={"interval": None}
    )


def local_state(made: Trainer) -> list[torch.Tensor]:
    """This rank's parts of parameters and optimizer state."""
    tensors: list[torch.Tensor] = [*made.model.parameters]
    tensors += [v for p in made.model.parameters for v in made.optimizer.state[p].values()]
    return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def poisoned(
    settings: dict[str, Any], steps: list[int], factor: float, start: Position | None = None
) -> dict[str, Any]:
    """A run in which the loss of rank 0 is multiplied by `factor` in some steps."""
    made = trainer(settings)
    events: list[dict[str, Any]] = []
    states: list[list[torch.Tensor]] = []
    done = [start.step if start else 0]

    def multiply(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return (
            out * factor
            if done[0] + 1 in steps and dist.get_rank() == 0 and module.training
            else out
        )

    def stepped(step: int) -> None:
        done[0] = step
        states.append(local_state(made))

    made.model.module.register_forward_hook(multiply)
    saved: list[Position] = []
    hooks = Hooks(
        log=lambda row: events.append(asdict(row)),
        stepped=stepped,
        save=lambda position, *_: saved.append(position),
    )
    error, outcome = None, None
    try:
        outcome = train(
            made.config,
            made.model,
            made.optimizer,
            made.data,
            made.mesh,
            start or Position(),
            hooks,
        )
    except Diverged as raised:
        error = str(raised)
    same = [
        step
        for step in range(2, len(states) + 1)
        if all(map(torch.equal, states[step - 1], states[step - 2]))
    ]
    return {"events": events, "outcome": outcome, "error": error, "unchanged": same, "saved": saved}


@pytest.mark.slow
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_no_number_changes_nothing_on_any_rank(
    ranks: RankPool, factor: float
) -> None:
    for result in ranks.run(4, poisoned, settings_for(), [3, 6], factor):
        assert result["unchanged"] == [3, 6]
        assert [row for row in result["events"] if "skipped_steps" in row] == [
            {"step": 3, "skipped_steps": 1},
            {"step": 6, "skipped_steps": 2},
        ]
        rows = {row["step"]: row["grad_norm"] for row in result["events"] if "loss" in row}
        assert (
            rows[3] is None
            and rows[6] is None
            and all(rows[step] > 0 for step in (1, 2, 4, 5, 7, 8))
        )
        assert result["outcome"].skipped_steps == 2 and result["error"] is None
        assert result["saved"][-1].guard == {"skipped": 2, "in_a_row": 0, "recent": []}


THREE = "step 6: loss or gradient norm is no number (or a spike), 3 steps in a row"


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run(ranks: RankPool) -> None:
    results = ranks.run(4, poisoned, settings_for(max_skipped_steps=3), [2, 4, 5, 6], float("nan"))
    assert len({result["error"] for result in results}) == 1 and results[0]["error"].startswith(
        THREE
    )
    assert (
        ranks.run(4, poisoned, settings_for(max_skipped_steps=None), [2, 3, 4, 5, 6], float("nan"))[
            0
        ]["error"]
        is None
    )
    # those before a resume count
    start = Position(5, guard={"skipped": 2, "in_a_row": 2, "recent": []})
    result = ranks.run(4, poisoned, settings_for(max_skipped_steps=3), [6], float("nan"), start)[0]
    assert result["error"].startswith(THREE)


@pytest.mark.slow
def test_spikes_are_skipped_if_asked_for(ranks: RankPool) -> None:
    assert ranks.run(4, poisoned, settings_for(), [7], 50.0)[0]["unchanged"] == []
    result = ranks.run(4, poisoned, settings_for(spike_zscore=8.0, spike_window=4), [2, 7], 50.0)[0]
    assert result["unchanged"] == [7], "in step 2 there are not enough steps to judge by"


def test_the_guard_remembers() -> None:
    """What a checkpoint holds of it gives the same verdicts as going on."""
    from tp_trainer.config import Train

    settings = Train(spike_zscore=3.0, spike_window=5)
    whole, torch_rng = Guard(settings, torch.device("cpu"), {}), torch.Generator().manual_seed(0)
    values = (
        torch.rand(60, 2, generator=torch_rng)
        + torch.where(torch.arange(60) % 7 == 6, 3.0, 0.0)[:, None]
    ).unbind()
    verdicts, part = [], None
    for step, (loss, norm) in enumerate(values):
        verdicts.append(float(whole.judge(loss, norm)))
        if step == 30:
            part = Guard(settings, torch.device("cpu"), whole.memory())
        elif part is not None:
            assert float(part.judge(loss, norm)) == verdicts[-1]
    assert 3 < sum(verdicts) < 57


def wishing(
    settings: dict[str, Any], rank: int, step: int, wish: int
) -> tuple[Outcome, list[tuple[int, bool]]]:
    made = trainer(settings)
    seen, saved = [0], []

    def stepped(number: int) -> None:
        seen[0] = number

    def save(position: Position, validation_loss: float | None, last: bool) -> None:
        saved.append((position.step, last))

    def wishes() -> int:
        return wish if dist.get_rank() == rank and seen[0] + 1 == step else 0

    hooks = Hooks(log=lambda _: None, stepped=stepped, save=save, wishes=wishes)
    return (
        train(made.config, made.model, made.optimizer, made.data, made.mesh, Position(), hooks),
        saved,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wish", "ended", "saves"),
    [
        (SAVE, "finished", [(5, False), (8, True)]),
        (STOP, "stopped", [(5, True)]),
        (LEAVE, "left", [(5, True)]),
        (LEAVE | STOP, "stopped", [(5, True)]),
    ],
)
def test_a_wish_of_one_rank_is_fulfilled_by_all(
    ranks: RankPool, wish: int, ended: str, saves: list[tuple[int, bool]]
) -> None:
    for outcome, saved in ranks.run(4, wishing, settings_for(), 3, 5, wish):
        assert saved == saves and outcome.ended == ended and outcome.position.step == saves[-1][0]
        assert (outcome.validation_loss is None) is (ended != "finished")


def test_a_wish_to_stop_in_the_last_step_comes_too_late(ranks: RankPool) -> None:
    for outcome, saved in ranks.run(2, wishing, settings_for(2, 1), 1, 8, STOP):
        assert (
            saved == [(8, True)]
            and outcome.ended == "finished"
            and outcome.validation_loss is not None
        )
