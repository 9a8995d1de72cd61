"""worker.restore: what a checkpoint must fit before it is loaded, and what it goes on with."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest

from tp_trainer.checkpoint.state import RunState
from tp_trainer.checkpoint.store import UNFINISHED, Store, VerifiedCheckpoint
from tp_trainer.config import Config, ConfigError, Optim, load
from tp_trainer.data import Cursor, DataStream, Order
from tp_trainer.optim import Schedule
from tp_trainer.worker import restore

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


class Checkpoints:
    """One checkpoint, of a run on the tokens `b`; or none, but some that are passed over."""

    def __init__(
        self, step: int = 7, skipped: list[str] | None = None, run_dir: str = "/there", **state: Any
    ) -> None:
        self.store, self.restored, self.skipped = Store(run_dir), False, skipped
        values = {"epoch": 0, "offset": 8 * step, "data": "b", **state}
        made = RunState(step, tokens=99, global_batch_size=8, **values)
        self.found = VerifiedCheckpoint(step, f"{run_dir}/step_{step:08d}", made)

    def newest(self, launch: str | None) -> tuple[VerifiedCheckpoint | None, list[str]]:
        return (self.found, []) if self.skipped is None else (None, self.skipped)

    def restore(self, found: VerifiedCheckpoint) -> RunState:
        self.restored = True
        return found.state


def configured(resume: str = "auto", train: dict[str, Any] | None = None, **optim: Any) -> Config:
    return load(
        {
            "experiment_name": "x",
            "model": {"architecture": ARCHITECTURE},
            "data": {"seq_length": 64},
            "checkpoint": {"resume": resume},
            "train": train or {"max_steps": 10},
            "optim": {"lr": 1e-3, **optim},
        }
    )


def data(config: Config, rows: int = 240, tokens: str = "b") -> DataStream:
    order = Order(rows, 8, 42, True, config.train.max_steps_per_epoch)
    train: Any = SimpleNamespace(identity=tokens)
    return DataStream(train, train, order, None, 0, 1, 8, None, {})


def test_other_tokens_are_refused_before_anything_is_loaded() -> None:
    config, saves = configured(), Checkpoints()
    made: Any = saves
    with pytest.raises(ConfigError, match="other tokens than /there/step_00000007"):
        restore(config, "now", made, data(config, tokens="a"))
    assert not saves.restored
    position, found, _, _ = restore(config, "now", made, data(config))
    assert (
        saves.restored
        and found is not None
        and (position.step, position.cursor.offset, position.tokens) == (7, 56, 99)
    )


@pytest.mark.parametrize(
    ("train", "total"), [({"num_epochs": 2}, 40 + 2 * 29), ({"max_steps": 60}, 60)]
)
@pytest.mark.parametrize(
    ("tokens", "length", "what"),
    [("a", 64, "other tokens"), ("b", 32, "rows of 64 tokens, not 32,")],
)
def test_other_rows_start_with_the_first(
    tokens: str, length: int, what: str, train: dict[str, Any], total: int
) -> None:
    """Steps count on, epochs are passes over the new rows, and a restart goes on among them."""
    config = configured(train=train)
    config.checkpoint.allow_mismatch = ["data"]
    before = Schedule.of(Optim(lr=1e-3), 40)
    guard = {"skipped": 3, "in_a_row": 0, "recent": [[1.0, 1.0]]}
    state: dict[str, Any] = {"epoch": 1, "schedule": asdict(before), "guard": guard}
    saves: Any = Checkpoints(40, seq_length=length, **state)
    stream = data(config, rows=29 * 8, tokens=tokens)
    position, _, _, (line, schedule) = restore(config, "now", saves, stream)
    assert (position.step, position.cursor, position.tokens) == (40, Cursor(), 99)
    assert position.guard == {"skipped": 3, "in_a_row": 0} and "recent" in saves.found.state.guard
    assert position.schedule is not None and position.schedule.total == total
    assert line == (
        f"data: {what} than /there/step_00000040 was trained on, taken from their first row;"
        " steps count on from 40, epochs anew"
    )
    assert schedule.startswith(f"schedule: the run was to have 40 steps and now has {total}: ")

    own: dict[str, Any] = {"data": tokens, "seq_length": 64, "offset": 8 * 4}
    again: Any = Checkpoints(44, **{**state, "epoch": 0, **own})
    position, _, _, notices = restore(config, "now", again, stream)
    assert position.cursor == Cursor(0, 32) and not any("data:" in each for each in notices)
    assert position.schedule is not None and position.schedule.total == total


def test_rows_of_a_release_that_kept_no_length_go_on() -> None:
    config, saves = configured(), Checkpoints()
    made: Any = saves
    position, _, _, notices = restore(config, "now", made, data(config))
    assert position.cursor.offset == 56 and not any("data:" in each for each in notices)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_checkpoints_of_which_none_counts(resume: str) -> None:
    """Found by reading them through, at a start or at a restart: a run doesn't start over."""
    config = configured(resume)
    damaged: Any = Checkpoints(
        skipped=["step_00000007 (damaged: 00000_0000.distcp has another checksum)"]
    )
    with pytest.raises(
        ConfigError,
        match=(
            rf"checkpoint.resume={resume}: /there holds .* none of them counts: step_00000007"
            r" \(damaged"
        ),
    ):
        restore(config, "now", damaged, data(config))
    unfinished: Any = Checkpoints(
        skipped=[f"step_00000007 ({UNFINISHED})"], run_dir="memory://there"
    )
    position, found, _, notices = restore(config, "now", unfinished, data(config))
    assert (position.step, found, notices) == (0, None, []) and position.schedule == Schedule.of(
        config.optim, 10
    )


# --------------------------------------------------------------------------------------------------


def resumed(saves: Any, **more: Any) -> tuple[Schedule, list[str]]:
    config = configured(**more)
    position, _, _, notices = restore(config, "now", saves, data(config))
    assert position.schedule is not None
    return position.schedule, notices


def test_the_schedule_of_the_first_start_stays() -> None:
    before = Schedule.of(Optim(lr=1e-3), 300)
    saves = Checkpoints(200, schedule=asdict(before))
    assert resumed(saves, train={"max_steps": 300}) == (before, [])
    after, (line,) = resumed(saves, train={"max_steps": 600})
    assert (after.warmup, after.start, after.total) == (15, 200, 600)
    # cosine, (200 - 15) of 284 steps down: 0.1 + 0.45 * (1 + cos(pi * 185 / 284)) = 0.3437
    assert (
        line
        == "schedule: the run was to have 300 steps and now has 600: from step 200 at 3.44e-04 to"
        " 1.00e-04 at step 600"
    )
    assert resumed(Checkpoints(200, schedule=asdict(after)), train={"max_steps": 600}) == (
        after,
        [],
    ), "said once"


def test_a_rate_of_nothing_is_said() -> None:
    saves = Checkpoints(300, schedule=asdict(Schedule.of(Optim(lr=1e-3, min_lr_ratio=0.0), 300)))
    _, (line,) = resumed(saves, train={"max_steps": 600}, min_lr_ratio=0.0)
    assert line.startswith("warning: schedule: ") and line.endswith(
        "at step 600; at a rate of 0 nothing is learned"
    )


def test_a_checkpoint_from_before_there_were_schedules() -> None:
    after, (line,) = resumed(Checkpoints(200), train={"max_steps": 600})
    assert after == Schedule.of(Optim(lr=1e-3), 600)
    assert line.startswith(
        "schedule: step_00000200 holds none, so it is that of a run of 600 steps from its start:"
        " from step 200"
    )


def test_another_schedule_that_is_let_through() -> None:
    saves = Checkpoints(200, schedule=asdict(Schedule.of(Optim(lr=1e-3), 300)))
    after, (line,) = resumed(saves, train={"max_steps": 600}, schedule="linear")
    assert (
        after == Schedule.of(Optim(schedule="linear"), 600)
        and "schedule: optim has changed, so it is that of a run of 600" in line
    )


def test_less_than_what_is_done_already() -> None:
    saves: Any = Checkpoints(40, epoch=1, offset=80, schedule=asdict(Schedule.of(Optim(), 90)))
    config = configured(train={"num_epochs": 1})
    with pytest.raises(
        ConfigError,
        match=r"train.num_epochs=1: the run is at step 40 already, in epoch 2; give more",
    ):
        restore(config, "now", saves, data(config))
    config = configured(train={"max_steps": 39})
    with pytest.raises(ConfigError, match=r"train.max_steps=39: the run is at step 40 already"):
        restore(config, "now", saves, data(config))
    saves = Checkpoints(5, schedule=asdict(Schedule.of(Optim(), 300)))
    config = configured(train={"max_steps": 12})
    with pytest.raises(
        ConfigError,
        match=r"train.max_steps=12: the warm-up takes 15 steps, as at the run's first start",
    ):
        restore(config, "now", saves, data(config))


def test_epochs_of_another_length() -> None:
    """An epoch has 30 steps; the first was cut after 10, of the second 4 are done: 26 + 30 are
    left.
    """
    config = configured(train={"num_epochs": 3})
    stream = data(config)
    assert stream.total_steps(config.train) == 90
    saves = Checkpoints(14, epoch=1, offset=32, schedule=asdict(Schedule.of(Optim(), 30)))
    schedule, (line,) = resumed(saves, train={"num_epochs": 3})
    assert schedule.total == 14 + 26 + 30 and "the run was to have 30 steps and now has 70" in line
    for step in range(90):
        unbroken: Any = Checkpoints(step, epoch=step // 30, offset=step % 30 * 8)
        position, _, _, _ = restore(config, "now", unbroken, stream)
        assert position.schedule is not None and position.schedule.total == 90
