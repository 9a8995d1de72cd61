"""The global order: the same for every layout, resumable anywhere, each row once."""

import numpy as np
import pytest

from tp_trainer.config import ConfigError
from tp_trainer.data.order import Cursor, Order, evaluation_batches, micro_batches, rank_slice

START = Cursor()


def read(order: Order, steps: int, cursor: Cursor = START) -> list[tuple[list[int], Cursor]]:
    found = []
    for _ in range(steps):
        indices, cursor = order.next(cursor)
        found.append((indices.tolist(), cursor))
    return found


def test_an_epoch_has_each_row_at_most_once_and_drops_the_tail() -> None:
    order = Order(rows=103, global_batch_size=8, seed=1, shuffle=True)
    assert order.steps_per_epoch == 12
    steps = read(order, 24)
    for epoch in (0, 1):
        rows = [row for indices, cursor in steps if cursor.epoch == epoch for row in indices]
        assert len(rows) == len(set(rows)) == 96 and set(rows) < set(range(103))
    assert [cursor.epoch for _, cursor in steps] == [0] * 12 + [1] * 12
    assert [cursor.offset for _, cursor in steps] == [8 * (i + 1) for i in range(12)] * 2


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return Order(64, 64, seed, True).next(Cursor(epoch, 0))[0].tolist()

    orders = [first(seed, epoch) for seed in (1, 2) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    assert orders == [first(seed, epoch) for seed in (1, 2) for epoch in (0, 1, 2)]
    assert list(range(64)) not in orders


def test_the_order_is_numpys_permutation_of_seed_and_epoch() -> None:
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, 3]))).permutation(50)
    assert Order(50, 10, 7, True).next(Cursor(3, 20))[0].tolist() == expected[20:30].tolist()


def test_without_shuffle_rows_come_in_order() -> None:
    steps = read(Order(10, 4, 5, False), 3)
    assert [indices for indices, _ in steps] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]


@pytest.mark.parametrize("cap", [None, 5])
def test_resuming_anywhere_is_continuing(cap: int | None) -> None:
    steps = read(Order(50, 6, 3, True, cap), 30)
    for done in range(30):
        assert (
            read(Order(50, 6, 3, True, cap), 30 - done, steps[done - 1][1] if done else START)
            == steps[done:]
        )


def test_capped_epochs() -> None:
    order = Order(100, 4, 0, True, max_steps_per_epoch=3)
    assert order.steps_per_epoch == 3
    assert [cursor for _, cursor in read(order, 4)] == [
        Cursor(0, 4),
        Cursor(0, 8),
        Cursor(0, 12),
        Cursor(1, 4),
    ]
    assert Order(100, 4, 0, True, max_steps_per_epoch=1000).steps_per_epoch == 25


def test_another_global_batch_size_goes_on_where_the_cursor_is() -> None:
    steps = read(Order(10, 3, 0, False), 2)
    assert read(Order(10, 4, 0, False), 2, steps[-1][1]) == [
        ([6, 7, 8, 9], Cursor(0, 10)),
        ([0, 1, 2, 3], Cursor(1, 4)),
    ]


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 8), (1, 2), (2, 4), (2, 2), (4, 2), (4, 1)])
def test_ranks_share_the_same_global_batches(dp_size: int, micro: int) -> None:
    for indices, _ in read(Order(40, 8, 9, True), 5):
        ranks = [micro_batches(np.array(indices), rank, dp_size, micro) for rank in range(dp_size)]
        assert all(len(part) == micro for rank in ranks for part in rank)
        assert {len(rank) for rank in ranks} == {8 // dp_size // micro}
        slices = [rank_slice(np.array(indices), rank, dp_size).tolist() for rank in range(dp_size)]
        assert [np.concatenate(rank).tolist() for rank in ranks] == slices
        together = [row for rows in zip(*slices, strict=True) for row in rows]
        assert together == indices


def test_too_few_rows() -> None:
    with pytest.raises(ConfigError) as caught:
        Order(7, 8, 0, True)
    assert (
        str(caught.value)
        == "train.global_batch_size=8: the training data has only 7 rows; give at most 7, a smaller"
        " data.seq_length or more data"
    )
    Order(8, 8, 0, True)
    with pytest.raises(ConfigError, match="only 0 rows; give a smaller"):
        Order(0, 8, 0, True)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 23, 24])
@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (1, 8), (2, 4), (4, 2), (3, 4)])
def test_evaluation_covers_each_row_once_with_equal_counts(
    rows: int, dp_size: int, micro: int
) -> None:
    ranks = [evaluation_batches(rows, rank, dp_size, micro) for rank in range(dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(part) == micro for rank in ranks for part in rank)
    indices = [index for rank in ranks for part in rank for index in part]
    assert sorted(index for index in indices if index != -1) == list(range(rows))
    assert indices.count(-1) < dp_size * micro
