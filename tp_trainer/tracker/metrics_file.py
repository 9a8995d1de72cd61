"""metrics.jsonl: the run's own record of its numbers."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from tp_trainer.tracker.folder import Folder
from tp_trainer.tracker.services import Row

TRIES = 4  # of an upload
PAUSE_SECONDS = 1.0  # after the first of them; after the others twice as much each
CLOSE_SECONDS = 60.0  # that the last upload may take


class MetricsFile:
    """<run_dir>/metrics.jsonl: one JSON object per line, append-only, written out line by line,
    floats in full precision.

    Of a run at a URL the file lies here, and a thread of its own brings it there: at each `flush`
    and at the end.

    Raises:
        OSError: it can't be read or written; of a URL, whatever the storage's client raises.
    """

    def __init__(self, run_dir: str) -> None:
        self.folder = Folder(run_dir)
        if self.folder.remote:
            _tried(lambda: self.folder.fetch("metrics.jsonl"))
        self.path = self.folder.local / "metrics.jsonl"
        _drop_torn_line(self.path)
        self.file: TextIO = self.path.open("a", encoding="utf-8")
        self.problem: str | None = None  # why the last upload failed
        self._wanted, self._closing = threading.Event(), False
        self._thread: threading.Thread | None = None
        if self.folder.remote:
            self._thread = threading.Thread(target=self._uploads, name="metrics", daemon=True)
            self._thread.start()

    def log(self, row: Row, step: int) -> None:
        line = {
            "step": step,
            **{key: _json_number(value) for key, value in row.items() if key != "step"},
        }
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()

    def flush(self) -> None:
        """Have it brought to remote storage, without waiting. Rows since the last checkpoint
        needn't be there:
        a run that dies does those steps again."""
        self._wanted.set()

    def close(self) -> None:
        """Raises OSError where remote storage hasn't all of it."""
        self.file.close()
        if self._thread is None:
            return
        self._closing = True
        self._wanted.set()
        self._thread.join(CLOSE_SECONDS)
        late = self._thread.is_alive()
        if late or self.problem is not None:
            reason = f"no answer for {CLOSE_SECONDS:g} s" if late else self.problem
            raise OSError(
                f"{self.folder.target}/metrics.jsonl can't be written ({reason}); "
                f"here it is {self.path}"
            )
        self.folder.remove()

    def _uploads(self) -> None:
        closing = False
        while not closing:
            self._wanted.wait()
            self._wanted.clear()
            # before the file is read: what is asked for later is uploaded later
            closing = self._closing
            try:
                _tried(self._upload)
                self.problem = None
            # every storage has its own errors; the next upload takes all of the file again
            except Exception as error:
                self.problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _upload(self) -> None:
        fs, path = self.folder._filesystem()
        content = self.path.read_bytes()
        # a line may be half written
        fs.pipe_file(f"{path}/metrics.jsonl", content[: content.rfind(b"\n") + 1])


def _tried(action: Callable[[], None]) -> None:
    """Do it, again where it fails, TRIES times in all. Raises the last error."""
    for attempt in range(TRIES):
        try:
            action()
            return
        except Exception:
            if attempt == TRIES - 1:
                raise
            time.sleep(PAUSE_SECONDS * 2**attempt)


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline: a process that was killed while it wrote leaves half a
    line."""
    if path.is_file() and not (content := path.read_bytes()).endswith(b"\n"):
        with path.open("rb+") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _json_number(value: float | int | None) -> float | int | None:
    """JSON knows no NaN and no infinity; null stands for both."""
    return None if value is None or not math.isfinite(value) else value
