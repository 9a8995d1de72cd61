"""Which rank sees which rows: one TP group the same ones, DP groups others, together the global
batch.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_reference import FAMILIES, settings_of
from rank_pool import RankPool

from tp_trainer.config import ConfigError, load
from tp_trainer.data import Cursor, open_data
from tp_trainer.parallel.mesh import build_mesh
from tp_trainer.session import Rank

LAYOUTS = [
    {"tp": 2, "dp": 2},
    {"tp": 1, "dp": 4},
    {"tp": 4, "dp": 1},
    {"tp": 1, "dp": 4, "dp_replicate": 2},
    {"tp": 2, "dp": 1},
]


def rows_of(dp_rank: int, dp_size: int, settings: dict[str, Any], steps: int) -> list[torch.Tensor]:
    """Each step's rows with their labels."""
    config = load(settings)
    stream = open_data(
        config,
        tokenizer="embedded",
        dp_rank=dp_rank,
        dp_size=dp_size,
        first_on_node=lambda make: make(),
    )
    cursor, out = Cursor(), []
    for _ in range(steps):
        parts, cursor = stream.step(cursor)
        assert all(part.input_ids.shape[0] == config.train.micro_batch_size for part in parts)
        out.append(torch.cat([torch.cat([part.input_ids, part.labels], 1) for part in parts]))
    return out


def rank_rows(
    settings: dict[str, Any], steps: int
) -> tuple[int, int, list[int], list[torch.Tensor]]:
    mesh = build_mesh(load(settings).parallelism, torch.device("cpu"))
    group = dist.get_process_group_ranks(mesh.tensor.group)
    return (
        mesh.tensor.rank,
        mesh.data.rank,
        group,
        rows_of(mesh.data.rank, mesh.data.size, settings, steps),
    )


def rank_of(rank: int) -> Rank:
    """A rank of two nodes of two, without Ray."""
    node = object.__new__(Rank)
    node.rank, node.node_rank, node.local_rank = rank, rank // 2, rank % 2
    return node


def first_of_node(directory: Path) -> tuple[str, str]:
    """What `first` gives on this rank, and what it says of data that differ from node to node."""
    rank = dist.get_rank()
    node = rank_of(rank)

    def make() -> str:
        (directory / str(rank)).touch()
        return f"made by {rank}"

    made, said = node.first(make), ""
    parts = [SimpleNamespace(identity=part) for part in (made, "same")]
    data: Any = SimpleNamespace(train=parts[0], validation=parts[1], found={"name": "a.jsonl"})
    try:
        node.check_alike(data)
    except ConfigError as error:
        said = str(error)
    data.train.identity = "same"
    node.check_alike(data)
    return made, said


def test_the_first_rank_of_a_node_makes_what_all_of_it_get(ranks: RankPool, tmp_path: Path) -> None:
    got = ranks.run(4, first_of_node, tmp_path)
    assert [made for made, _ in got] == ["made by 0", "made by 0", "made by 2", "made by 2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2"]
    assert {said for _, said in got} == {
        "data.name=a.jsonl: the nodes hold different data under this name; "
        "give a path that they share"
    }


@pytest.mark.parametrize(
    "layout", LAYOUTS, ids=lambda layout: "_".join(f"{key}{value}" for key, value in layout.items())
)
def test_rows(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, layout: dict[str, int]
) -> None:
    cache = tmp_path_factory.getbasetemp() / "tokens"
    architecture = {**FAMILIES["qwen2"], "vocab_size": 4096}
    settings = settings_of(
        architecture,
        parallelism=layout,
        data={"source": "embedded", "seq_length": 64, "cache_dir": str(cache)},
    )
    # makes the token file too
    whole = rows_of(0, 1, {**settings, "parallelism": {"tp": 1, "dp": 1}}, 3)
    world = layout["tp"] * layout["dp"]
    got = ranks.run(world, rank_rows, settings, 3)
    by_dp: dict[int, list[torch.Tensor]] = {}
    for rank, (tp_rank, dp_rank, group, rows) in enumerate(got):
        assert (tp_rank, dp_rank) == (rank % layout["tp"], rank // layout["tp"])
        assert group == [dp_rank * layout["tp"] + each for each in range(layout["tp"])]
        first = by_dp.setdefault(dp_rank, rows)
        assert all(torch.equal(a, b) for a, b in zip(first, rows, strict=True)), (
            "a TP group's batches differ"
        )
    assert len(by_dp) == layout["dp"]
    for step, batch in enumerate(whole):
        parts = [tuple(row) for rows in by_dp.values() for row in rows[step].tolist()]
        assert len(set(parts)) == len(parts) == 8, "DP ranks share rows"
        assert set(parts) == {tuple(row) for row in batch.tolist()}
    assert Path(cache).is_dir()
