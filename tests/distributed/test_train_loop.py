"""loop.train and loop.evaluate: what is logged, evaluated and saved when, in which order data come,
how a run goes on.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_reference import FAMILIES, Reference, data_of, saved, settings_of
from rank_cases import trainer
from rank_pool import RankPool

from tp_trainer.checkpoint.saving import Checkpoints
from tp_trainer.checkpoint.state import RunState
from tp_trainer.data import Cursor
from tp_trainer.loop import Hooks, Outcome, Position, evaluate, train


def run_train(
    settings: dict[str, Any], run_dir: str | None = None, resume_at: int | None = None
) -> tuple[list[tuple[str, Any]], Outcome]:
    """A run with hooks that write down what they are called with, in order; it saves to `run_dir`
    and goes on from there.
    """
    made = trainer(settings)
    saves = (
        Checkpoints(run_dir, 100, made.model.module, made.optimizer, made.mesh.device)
        if run_dir
        else None
    )
    start = Position()
    events: list[tuple[str, Any]] = []
    if saves and resume_at is not None:
        found = saves.store.check(f"step_{resume_at:08d}")
        assert not isinstance(found, str)
        state = saves.restore(found)
        start = Position(resume_at, Cursor(state.epoch, state.offset), state.tokens)

    def save(position: Position, validation_loss: float | None, last: bool) -> None:
        events.append(("save", (position, validation_loss)))
        if saves and resume_at is None:
            cursor = position.cursor
            size = made.data.order.global_batch_size
            state = RunState(position.step, cursor.epoch, cursor.offset, position.tokens, size)
            saves.save(state, last)

    hooks = Hooks(
        log=lambda row: events.append(("log", asdict(row))),
        stepped=lambda step: events.append(("stepped", step)),
        save=save,
    )
    outcome = train(made.config, made.model, made.optimizer, made.data, made.mesh, start, hooks)
    assert made.model.module.training
    return events, outcome


def of(events: list[tuple[str, Any]], kind: str) -> list[Any]:
    """The arguments of one hook; `loss` and `validation` are the two kinds of rows."""
    if kind in ("loss", "validation"):
        key = "loss" if kind == "loss" else "validation_loss"
        return [row for name, row in events if name == "log" and key in row]
    return [value for name, value in events if name == kind]


def settings_for(
    tp: int = 1, dp: int = 1, interval: int | None = None, seed: int = 42, **train: Any
) -> dict[str, Any]:
    train = {"log_interval": 1, "eval_interval": None, "eval_batches": 1, **train}
    values = settings_of(FAMILIES["qwen2"], tp, dp, train=train, checkpoint={"interval": interval})
    return {**values, "seed": seed}


@pytest.mark.slow
def test_intervals(ranks: RankPool) -> None:
    settings = settings_for(2, 2, log_interval=4, eval_interval=3, interval=5, max_steps=11)
    results = ranks.run(4, run_train, settings)
    for events, outcome in results:
        assert of(events, "stepped") == list(range(1, 12))
        assert [row["step"] for row in of(events, "loss")] == [1, 4, 8, 11]
        assert [row["step"] for row in of(events, "validation")] == [3, 6, 9, 11]
        assert [position.step for position, _ in of(events, "save")] == [5, 10, 11]
        validation = {row["step"]: row["validation_loss"] for row in of(events, "validation")}
        assert [loss for _, loss in of(events, "save")] == [
            validation[3],
            validation[9],
            validation[11],
        ]
        assert (
            outcome.validation_loss == validation[11]
            and outcome.loss == of(events, "loss")[-1]["loss"]
        )
        assert (
            outcome.position == Position(11, Cursor(0, 88), 11 * 8 * 64)
            and outcome.tokens_trained == 11 * 8 * 64
        )
        assert [name for name, _ in events][-4:] == ["stepped", "log", "log", "save"]
    assert all(
        [row["loss"] for row in of(events, "loss")]
        == [row["loss"] for row in of(results[0][0], "loss")]
        for events, _ in results
    )


def test_the_last_step_is_evaluated_and_saved_once(ranks: RankPool) -> None:
    events, _ = ranks.run(
        1, run_train, settings_for(log_interval=3, eval_interval=3, interval=3, max_steps=6)
    )[0]
    assert [row["step"] for row in of(events, "loss")] == [1, 3, 6]
    assert [row["step"] for row in of(events, "validation")] == [3, 6]
    assert [position.step for position, _ in of(events, "save")] == [3, 6]


def test_without_intervals_the_end_is_evaluated_and_saved(ranks: RankPool) -> None:
    events, _ = ranks.run(1, run_train, settings_for(log_interval=100, max_steps=3))[0]
    assert [row["step"] for row in of(events, "loss")] == [1, 3]
    assert (
        [row["step"] for row in of(events, "validation")]
        == [3]
        == [position.step for position, _ in of(events, "save")]
    )


def test_rows(ranks: RankPool) -> None:
    settings = settings_for(1, 2, num_epochs=2, max_steps_per_epoch=3, max_steps=None)
    settings["optim"].update(schedule="linear", warmup_steps=2, min_lr_ratio=0.0)
    events, outcome = ranks.run(2, run_train, settings)[0]
    rows = of(events, "loss")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and [
        row["epoch"] for row in rows
    ] == [0, 0, 0, 1, 1, 1]
    assert [row["tokens"] for row in rows] == [512 * step for step in range(1, 7)]
    assert [row["lr"] for row in rows] == pytest.approx(
        [0.5e-3, 1e-3, 1e-3, 1e-3 * 2 / 3, 1e-3 / 3, 0.0]
    )
    assert outcome.position.cursor == Cursor(1, 24)
    for row in rows:
        assert set(row) == {
            "step",
            "epoch",
            "tokens",
            "loss",
            "grad_norm",
            "lr",
            "tokens_per_second",
            "tokens_per_second_per_worker",
            "mfu",
            "memory_gib",
            "step_seconds",
        }
        assert row["mfu"] is None and row["memory_gib"] > 0 and row["grad_norm"] > 0
        assert row["tokens_per_second"] == pytest.approx(512 / row["step_seconds"])
        assert row["tokens_per_second_per_worker"] == pytest.approx(row["tokens_per_second"] / 2)


def test_the_learning_rate_is_used(ranks: RankPool) -> None:
    settings = settings_for(max_steps=3)
    settings["optim"].update(schedule="linear", min_lr_ratio=0.0)
    rising = [row["loss"] for row in of(ranks.run(1, run_train, settings)[0][0], "loss")]
    settings["optim"].update(schedule="constant")
    constant = [row["loss"] for row in of(ranks.run(1, run_train, settings)[0][0], "loss")]
    # the second step had another rate, the third sees it
    assert rising[:2] == constant[:2] and rising[2] != constant[2]


@pytest.mark.slow
def test_the_order_does_not_depend_on_dp(ranks: RankPool) -> None:
    losses = []
    for tp, dp in ((1, 1), (1, 2), (1, 4), (2, 2)):
        events, outcome = ranks.run(
            tp * dp,
            run_train,
            settings_for(tp, dp, max_steps=6, eval_interval=2, eval_batches=None),
        )[0]
        losses.append(
            [row["loss"] for row in of(events, "loss")]
            + [row["validation_loss"] for row in of(events, "validation")]
        )
        assert outcome.position.cursor == Cursor(0, 48)
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-6, abs=0)


@pytest.mark.slow
def test_a_resume_goes_on(ranks: RankPool, tmp_path: Path) -> None:
    settings = settings_for(
        2, 2, interval=4, eval_interval=3, max_steps=10, num_epochs=3, max_steps_per_epoch=3
    )
    settings["optim"].update(schedule="cosine", warmup_steps=2)
    events, outcome = ranks.run(4, run_train, settings, str(tmp_path))[0]
    went_on, resumed = ranks.run(4, run_train, settings, str(tmp_path), 4)[0]

    def numbers(rows: list[dict[str, Any]]) -> list[list[Any]]:
        return [
            [row[key] for key in ("step", "epoch", "tokens", "loss", "grad_norm", "lr")]
            for row in rows
        ]

    assert numbers(of(went_on, "loss")) == numbers(of(events, "loss"))[4:]
    assert of(went_on, "validation") == of(events, "validation")[1:]
    assert of(went_on, "save") == [
        (position, loss) for position, loss in of(events, "save") if position.step > 4
    ]
    assert (
        resumed.position == outcome.position and resumed.validation_loss == outcome.validation_loss
    )
    assert resumed.tokens_trained == 6 * 8 * 64


def test_a_resume_at_the_end_only_evaluates(ranks: RankPool, tmp_path: Path) -> None:
    settings = settings_for(1, 2, max_steps=2)
    _, outcome = ranks.run(2, run_train, settings, str(tmp_path))[0]
    events, again = ranks.run(2, run_train, settings, str(tmp_path), 2)[0]
    assert [name for name, _ in events if name != "log"] == []
    assert (
        again.validation_loss == outcome.validation_loss
        and again.position == outcome.position
        and again.tokens_trained == 0
    )


# --------------------------------------------------------------------------------------------------


def run_evaluate(settings: dict[str, Any]) -> tuple[float, int]:
    made = trainer(settings)
    return evaluate(made.model, made.data.evaluation(), made.mesh), len(
        list(made.data.evaluation())
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen2_dropout"])
def test_evaluation_is_the_mean_over_the_validation_labels(
    ranks: RankPool, models: Path, family: str
) -> None:
    """64 rows in micro-batches of 3: with dp 4 the last ones hold rows that don't count. Dropout is
    off.
    """
    train = {"micro_batch_size": 3, "global_batch_size": 12, "clip_grad_norm": 0.5}
    settings = settings_of(saved(models, family), train=train)
    rows = data_of(settings).validation
    assert len(rows) == 64
    reference = Reference(settings)
    reference.model.eval()
    batch = rows.batch(range(64))
    with torch.no_grad():
        expected = reference.loss(batch.input_ids, batch.labels).item()
    for tp, dp, batches in ((1, 1, 22), (1, 4, 6), (2, 2, 11)):
        results = ranks.run(
            tp * dp, run_evaluate, {**settings, "parallelism": {"tp": tp, "dp": dp}}
        )
        assert results == [(pytest.approx(expected, rel=1e-6), batches)] * (tp * dp)


def passes(settings: dict[str, Any]) -> tuple[list[bool], int]:
    """Of a step and an evaluation: for each call of `before_pass`, whether it came from training;
    and the batches evaluated.
    """
    made = trainer(settings)
    seen: list[bool] = []
    made.model.before_pass = seen.append
    made.step()
    evaluate(made.model, made.data.evaluation(), made.mesh)
    return seen, sum(1 for _ in made.data.evaluation())


def test_every_pass_is_announced(ranks: RankPool) -> None:
    """A hang alarm counts on it: once for each micro-batch and each batch of an evaluation."""
    seen, evaluated = ranks.run(2, passes, settings_for(2, 1, eval_batches=2))[0]
    assert seen == [True] * 4 + [False] * evaluated and evaluated > 1
