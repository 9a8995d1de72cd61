"""What a key names as `package.module:name`."""

from __future__ import annotations

import importlib
import os
import sys

# environment: the command's working directory (driver -> workers)
DIRECTORY = "TP_TRAINER_DIRECTORY"


def imported(reference: str) -> object:
    """What `package.module:name` names.

    Where Python finds no such module it is looked for in the command's working directory, which
    then stays on the path, as the last: it shadows nothing.

    Raises:
        Exception: whatever the import raises, or AttributeError.
    """
    module, _, name = reference.partition(":")
    directory = os.environ.get(DIRECTORY) or os.getcwd()
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}.") or directory in sys.path:
            raise
        sys.path.append(directory)
        found = importlib.import_module(module)
    return getattr(found, name)
