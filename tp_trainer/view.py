"""What a person sees on the driver while a run goes on: a live bar on a terminal, plain lines
anywhere else.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tp_trainer.config import Config
from tp_trainer.messages import DataFound, Evaluated, FastPath, StepDone, StepLogged, StepSkipped


class View:
    """The run's progress. `start`, then `update` for each step that rank 0 tells of, then `close`
    (also after an error).
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total = 0
        self.step = 0
        self.logged: StepLogged | None = None  # the last one
        self.validation_loss: float | None = None
        # (seconds, step) of the last updates: the pace
        self.marks: deque[tuple[float, int]] = deque(maxlen=50)
        self.live: Live | None = None

    def start(self, total_steps: int, config: Config, world: int, device: str) -> None:
        """Say what begins and put up the bar. Called again after a restart, it only takes the new
        total.
        """
        again, self.total = self.total > 0, total_steps
        if again:
            self.marks.clear()  # the pace begins anew
            return
        layout = f"dp={config.parallelism.dp} x tp={config.parallelism.tp}"
        self.say(
            f"{config.experiment_name}: {total_steps:,} steps on {world} {device} workers"
            f" ({layout})"
        )
        if self.console.is_terminal:
            self.live = Live(self, console=self.console, refresh_per_second=4)
            self.live.start()

    def update(self, news: StepDone | StepLogged | StepSkipped | Evaluated) -> None:
        """Take what a step came to; one that is only done moves the bar."""
        self._mark(news.step)
        if isinstance(news, Evaluated):
            self.validation_loss = news.validation_loss
            self.say(f"{self._position()} | validation loss {_loss(self.validation_loss)}")
        elif isinstance(news, StepSkipped):
            self.say(
                f"step {news.step} skipped: its loss or gradient norm is no number, or a spike"
                f" ({news.skipped_steps} so far)"
            )
        elif isinstance(news, StepLogged):
            self.logged = news
            if self.live is None:
                self.say(" | ".join([self._position(), *self._figures(news), *self._left()]))

    def close(self) -> None:
        """Take the bar down; its last state stays on the screen."""
        live, self.live = self.live, None
        if live is not None:
            with self._if_there():
                live.stop()

    def say(self, text: str) -> None:
        """Print lines as they are, above the bar where there is one: no markup, and no wrapping in
        plain output.
        """
        with self._if_there():
            if self.live is not None:
                self.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=self.console.file, flush=True)

    @contextmanager
    def _if_there(self) -> Iterator[None]:
        """A screen may be gone (a pipe whose reader has ended, a closed terminal): a run goes on
        without one."""
        try:
            yield
        except OSError:
            # what it still holds must go somewhere at the end of the program
            if self.console.file is sys.stdout:
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar as it stands now: one line of progress, and the figures below it on as many as
        they need.
        """
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        bar = ProgressBar(total=max(self.total, 1), completed=min(self.step, self.total))
        done = ", ".join([f"{self.step / max(self.total, 1):.0%}", *self._left()])
        head.add_row(Text(self._position(), style="bold"), bar, Text(done))
        yield head
        figures = self._figures(self.logged) if self.logged else ["no step logged yet"]
        if self.logged and self.validation_loss is not None:
            figures.insert(1, f"validation {_loss(self.validation_loss)}")
        # textwrap breaks no line at a no-break space: a figure and its unit stay together
        text = "   ".join(figure.replace(" ", "\u00a0") for figure in figures)
        yield Text(
            "\n".join(textwrap.wrap(text, options.max_width, break_on_hyphens=False)), style="cyan"
        )

    def _mark(self, step: int) -> None:
        if step < self.step:  # a restart went back to its checkpoint: the pace begins anew
            self.marks.clear()
        if not self.marks or step != self.step:
            self.marks.append((time.monotonic(), step))
        self.step = step

    def _position(self) -> str:
        return f"step {self.step}/{self.total}"

    def _figures(self, logged: StepLogged) -> list[str]:
        """A logged step, as one would read it out; what isn't known is left out."""
        formats = {
            "grad_norm": "grad norm {:.3f}",
            "lr": "lr {:.2e}",
            "tokens_per_second": "{:,.0f} tokens/s",
            "tokens_per_second_per_worker": "{:,.0f} tokens/s/worker",
            "memory_gib": "{:.2f} GiB",
            "mfu": "MFU {:.1%}",
        }
        # on the bar, only what one looks up for: metrics.jsonl has the rest
        if self.live is not None:
            del formats["grad_norm"], formats["lr"]
        values = {key: getattr(logged, key) for key in formats}
        known = [formats[key].format(each) for key, each in values.items() if each is not None]
        return [f"loss {_loss(logged.loss)}", *known]

    def _left(self) -> list[str]:
        """The time left at the pace of the last updates, or nothing while there is no pace."""
        if len(self.marks) < 2 or self.step >= self.total:
            return []
        (then, first), (now, last) = self.marks[0], self.marks[-1]
        pace = (now - then) / (last - first)
        return [
            f"{duration(max(0.0, pace * (self.total - self.step) - (time.monotonic() - now)))} left"
        ]


def path_line(paths: Mapping[str, FastPath]) -> str:
    """Which fast paths are taken, and why others aren't."""
    on = ", ".join(name for name, path in paths.items() if path.on) or "none"
    reasons: dict[str, list[str]] = {}
    for name, path in paths.items():
        if not path.on:
            reasons.setdefault(path.why, []).append(name)
    off = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    return f"fast paths: {on}{f'; off: {off}' if off else ''}"


def data_lines(data: DataFound) -> list[str]:
    """What was found of the data, in a line, and what became of it, in another."""
    if "train" not in data:
        return ["data: random tokens, for benchmarks only"]
    parts = [("train", data["train"]), ("validation", data["validation"])]
    skipped = sum(part["documents_skipped"] for _, part in parts)
    kinds = Counter[str]()
    for _, part in parts:
        kinds.update(part["skipped"])
    first = [where for _, part in parts for where in part["first_skipped"]][:3]
    line = f"data: {source_line(data)}"
    if skipped:
        why = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        line += f"; skipped {skipped:,} ({why}): {_first(first, skipped)}"
    if ignored := data["files_ignored"]:
        line += f"; ignored {ignored:,}: {_first(data['first_ignored'], ignored)}"
    amounts = [
        f"{name} {_number(part['documents'], 'document')}, {part['tokens']:,} tokens, "
        f"{_number(part['rows'], 'row')} ({part['tokens_dropped']:,} tokens left over at the end)"
        for name, part in parts
    ]
    return [line, f"tokenizer {data['tokenizer']}: {'; '.join(amounts)}"]


def source_line(data: DataFound) -> str:
    """The source, its name, and how many files it has."""
    files, revision = data["files"], f" at {data['revision']}" if data["revision"] else ""
    amount = f", {_number(files, 'file')}" if files else ""
    return f"{data['source']} {data['name'] or 'Moby-Dick'}{revision}{amount}"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _first(names: Sequence[str], count: int) -> str:
    return ", ".join(names) + (", ..." if count > len(names) else "")


def _loss(value: float | None) -> str:
    """A loss that came as null was no number."""
    return "nan" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """As on a clock: 42 s, 3:05 min, 2:03:05 h."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
