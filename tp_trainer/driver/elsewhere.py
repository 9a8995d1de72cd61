"""A run that is this one, under the name that another path gave it."""

from __future__ import annotations

from contextlib import suppress

from tp_trainer.checkpoint.store import Store
from tp_trainer.config import Config, is_derived, paths_alone

HASH = 8  # characters at the end of a derived name


def run_elsewhere(config: Config) -> str | None:
    """A sentence where the storage holds a run of a derived name that differs from this one in
    paths alone, as those of a project that was moved: to go on with it is for the user to say.
    """
    name = config.experiment_name
    if not is_derived(config):
        return None
    with suppress(Exception):  # every file system has its own; nothing hangs on it
        for other in sorted(Store(config.checkpoint.storage_path).names()):
            if other == name or len(other) != len(name) or other[:-HASH] != name[:-HASH]:
                continue
            store = Store(f"{config.checkpoint.storage_path.rstrip('/')}/{other}")
            paths = paths_alone(config, store.read_yaml("config.yaml") or {})
            if paths is not None and store.newest()[0] is not None:
                spelled = ", ".join(paths) or "spelled otherwise"
                return (
                    f"{store.run_dir} holds a run that differs from this one in paths alone"
                    f" ({spelled}); to go on with it: experiment_name={other}"
                )
    return None
