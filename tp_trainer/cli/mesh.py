"""What `dry_run` draws."""

from __future__ import annotations

from collections.abc import Sequence

from tp_trainer.config import Parallelism


def draw_mesh(parallelism: Parallelism) -> str:
    """The mesh as a grid: a row for each data-parallel rank, a column for each tensor-parallel
    rank, workers' numbers inside.
    """
    tp, dp, replicas = parallelism.tp, parallelism.dp, parallelism.dp_replicate
    shards = dp // replicas

    def group(workers: Sequence[int]) -> str:
        return "{" + ", ".join(map(str, workers)) + "}"

    sizes = (
        f"dp_replicate={replicas}, dp={shards}, tp={tp}" if replicas > 1 else f"dp={dp}, tp={tp}"
    )
    workers = tp * dp
    lines = [f"mesh ({sizes}): {workers} worker{'s' if workers > 1 else ''}", ""]
    labels = [
        f"replica {row // shards}, dp {row % shards}" if replicas > 1 else f"dp {row}"
        for row in range(dp)
    ]
    width, cell = max(map(len, labels)) + 2, max(len(str(workers)), len(f"tp {tp - 1}")) + 2
    lines.append(" " * width + "".join(f"tp {rank}".rjust(cell) for rank in range(tp)))
    for row, label in enumerate(labels):
        if row and row % shards == 0:
            lines.append("")
        ranks = range(row * tp, (row + 1) * tp)
        lines.append(
            label.ljust(width)
            + "".join(str(rank).rjust(cell) for rank in ranks)
            + f"    TP group {group(ranks)}"
        )
    lines.append("")
    for rank in range(tp):
        column = range(rank, workers, tp)
        line = f"DP group of tp {rank}: {group(column)}"
        if replicas > 1:
            parts = [
                group(column[replica * shards : (replica + 1) * shards])
                for replica in range(replicas)
            ]
            line += f", sharded over {' and '.join(parts)}, replicated across them"
        lines.append(line)
    return "\n".join(lines)
