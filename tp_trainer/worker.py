"""The recipe that every rank runs, from top to bottom. Ray Train has made the process group before it begins."""

from __future__ import annotations

from contextlib import closing
from statistics import mean
from typing import Any

import torch

from tp_trainer.checkpoint.owner import owned_by
from tp_trainer.checkpoint.state import Checkpoints
from tp_trainer.checkpoint.store import Found
from tp_trainer.config import Config, ConfigError, check_same_tokens, check_schedule_length, load
from tp_trainer.data import Cursor, open_data
from tp_trainer.loop import Position, train
from tp_trainer.models.build import build_model
from tp_trainer.optim import build_optimizer
from tp_trainer.parallel.mesh import build_mesh
from tp_trainer.session import Node, Reporter, Watch


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Train as `settings` say.

    Args:
        settings: `config` (plain), `launch` (the name of this start of the program), `tokenizer` (as the driver chose
            it), `progress` (the driver's actor).

    Returns:
        What the driver needs for the summary.

    Raises:
        ConfigError: refused; the same on every rank.
    """
    config, launch = load(settings["config"]), settings["launch"]
    node = Node(config)
    node.agree(lambda: node.check(config, launch))
    mesh = build_mesh(config.parallelism, node.device)
    model = node.agree(lambda: build_model(config, mesh, node.first))
    data = node.agree(lambda: open_data(
        config, tokenizer=settings["tokenizer"], dp_rank=mesh.dp_rank, dp_size=mesh.dp_size, first_on_node=node.first))  # fmt: skip
    watch = Watch(config, node, launch, settings["progress"])  # not before: model and data may have to be downloaded and tokenised
    model.before_pass = lambda: watch.forward(model.module.training)
    total_steps = data.total_steps(config.train)
    optimizer = build_optimizer(config.optim, model.module.named_parameters())
    keep = config.checkpoint
    checkpoints = Checkpoints(config.run_dir, keep.keep_last, model.module, optimizer, node.device,
                              keep_every=keep.keep_every, keep_best=keep.keep_best, asynchronous=keep.asynchronous,
                              permitted=lambda: owned_by(checkpoints.store, launch))  # fmt: skip
    # of dropout: another on every rank, but for a residual stream that a TP group holds in common; a restore brings back its own
    torch.manual_seed(config.seed + 1 + (node.rank if config.parallelism.sequence_parallel else mesh.dp_rank))
    start, found, skipped = node.agree(lambda: restore(config, launch, checkpoints, total_steps, data.train.identity))
    with closing(model), Reporter(config, node, checkpoints, data, launch, settings["progress"], watch) as reporter:
        reporter.begin(start.step, total_steps)
        outcome = train(config, model, optimizer, data, mesh, start, reporter.hooks)
    watch.off()
    return {
        "ended": outcome.ended, "steps": outcome.position.step, "tokens": outcome.position.tokens, "loss": outcome.loss,
        "validation_loss": outcome.validation_loss, "unigram_loss": data.unigram_loss,
        "skipped_steps": outcome.skipped_steps,
        "tokens_per_second": outcome.tokens_trained / outcome.training_seconds if outcome.tokens_trained else None,
        "resumed_from": found.step if found else None, "skipped_checkpoints": skipped,
        "failed_saves": reporter.failed_saves, "checkpoint_pause_seconds": mean(checkpoints.pauses) if checkpoints.pauses else None,
        "checkpoint": reporter.last_checkpoint or (found.path if found else None),
    }  # fmt: skip


def restore(
    config: Config, launch: str, checkpoints: Checkpoints, total_steps: int, tokens: str
) -> tuple[Position, Found | None, list[str]]:
    """Where to go on: the newest checkpoint of this launch (a restart), else what `checkpoint.resume` says, else the start.

    Whatever is taken has been read through and is whole.

    Returns the position, the checkpoint that it comes from (None: from the start) and those that were passed over.
    """
    check_schedule_length(config.optim, total_steps)
    resume = config.checkpoint.resume
    found, skipped = checkpoints.newest(launch if resume != "auto" else None)
    if found is None and resume not in ("auto", "never"):
        pinned = checkpoints.pinned(resume)
        if isinstance(pinned, str):
            raise ConfigError("checkpoint.resume", resume, pinned)
        found = pinned
    if found is None:
        return Position(), None, skipped
    check_same_tokens(config, tokens, found.state.get("data"), found.path)
    state = checkpoints.restore(found)
    cursor = Cursor(int(state["epoch"]), int(state["offset"]))
    return Position(found.step, cursor, int(state["tokens"]), state.get("guard", {})), found, skipped
