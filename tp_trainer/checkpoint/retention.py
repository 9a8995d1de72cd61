"""Which checkpoints stay, and how the others go."""

from __future__ import annotations

from collections.abc import Callable, Collection

from tp_trainer.checkpoint.manifest import MANIFEST
from tp_trainer.checkpoint.store import UNFINISHED, Store, Unknown, VerifiedCheckpoint, step_number


def keep(
    store: Store,
    last: int,
    every: int | None = None,
    best: int = 0,
    damaged: Collection[str] = (),
    sure: str | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> None:
    """Delete checkpoints that nothing keeps, and unfinished ones that are older than one that
    counts.

    What can't be looked at may be whole: it is left alone, and `warn` hears of it.

    Kept are the newest `last`, those whose step is divisible by `every`, and the `best` with
    the lowest validation loss (of equal ones the oldest: a loss is measured at or before its
    checkpoint). Where deleting fails, `warn` hears of it.

    Args:
        damaged: names that were found damaged; they keep nothing.
        sure: a name that stays whatever the rules say: the one just written.
    """
    names = store.step_names()
    seen = {name: store.check(name) for name in names}
    for name, why in seen.items():
        if isinstance(why, Unknown):
            warn(f"{name} is left alone: {why}")
    whole = [
        found
        for name, found in seen.items()
        if name not in damaged and isinstance(found, VerifiedCheckpoint)
    ]
    if not whole:
        return
    losses = [
        (loss, found.step, found.name)
        for found in whole
        if (loss := found.state.validation_loss) is not None
    ]
    newest = [found.name for found in whole[-last:]]
    kept = {*newest, *(name for _, _, name in sorted(losses)[:best]), *([sure] if sure else [])}
    kept |= {found.name for found in whole if every and found.step % every == 0}
    counting = {found.name for found in whole}
    for name in names:
        if isinstance(seen[name], Unknown):
            continue
        unfinished = seen[name] == UNFINISHED and step_number(name) < whole[-1].step
        # damaged ones among them
        old = len(newest) == last and step_number(name) < step_number(newest[0])
        if name not in kept and (unfinished or old or name in counting):
            store.try_remove(name, warn, first=MANIFEST)
