"""What a person sees on the driver: a live bar on a terminal, plain lines anywhere else, and the closing block."""

from __future__ import annotations

import textwrap
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tp_trainer.config import Config

Row = Mapping[str, Any]


class View:
    """The run's progress. `start`, then `update` for each row that rank 0 sends, then `close` (also after an error).

    Rows are those of metrics.jsonl (`mfu` is a fraction), evaluations (`step validation_loss`), notices
    (`{"event": text}`) and bare steps (`{"step": n}`), which move the bar between logged rows.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total = 0
        self.step = 0
        self.row: dict[str, Any] = {}
        self.validation_loss: float | None = None
        self.marks: deque[tuple[float, int]] = deque(maxlen=50)  # (seconds, step) of the last updates: the pace
        self.live: Live | None = None

    def start(self, total_steps: int, config: Config, world: int, device: str) -> None:
        """Say what begins and put up the bar. Called again after a restart, it only takes the new total."""
        again, self.total = self.total > 0, total_steps
        if again:
            self.marks.clear()  # the pace begins anew
            return
        layout = f"dp={config.parallelism.dp} x tp={config.parallelism.tp}"
        self._line(f"{config.experiment_name}: {total_steps:,} steps on {world} {device} workers ({layout})")
        if self.console.is_terminal:
            self.live = Live(self, console=self.console, refresh_per_second=4)
            self.live.start()

    def update(self, row: Row) -> None:
        """Take one row."""
        if "event" in row:
            self._line(str(row["event"]))
            return
        self._mark(int(row["step"]))
        if "validation_loss" in row:
            self.validation_loss = row["validation_loss"]
            self._line(f"{self._position()} | validation loss {_loss(self.validation_loss)}")
        elif "skipped_steps" in row:
            self._line(f"step {row['step']} skipped: its loss or gradient norm is no number, or a spike ({row['skipped_steps']} so far)")
        elif "loss" in row:
            self.row = dict(row)
            if self.live is None:
                self._line(" | ".join([self._position(), *self._figures(), *self._left()]))

    def close(self) -> None:
        """Take the bar down; its last state stays on the screen."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar as it stands now: one line of progress, and the figures below it on as many as they need."""
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        bar = ProgressBar(total=max(self.total, 1), completed=min(self.step, self.total))
        done = ", ".join([f"{self.step / max(self.total, 1):.0%}", *self._left()])
        head.add_row(Text(self._position(), style="bold"), bar, Text(done))
        yield head
        figures = self._figures() if self.row else ["no step logged yet"]
        if self.row and self.validation_loss is not None:
            figures.insert(1, f"validation {_loss(self.validation_loss)}")
        # textwrap breaks no line at a no-break space: a figure and its unit stay together
        text = "   ".join(figure.replace(" ", "\u00a0") for figure in figures)
        yield Text("\n".join(textwrap.wrap(text, options.max_width, break_on_hyphens=False)), style="cyan")

    def _mark(self, step: int) -> None:
        if step < self.step:  # a restart went back to its checkpoint: the pace begins anew
            self.marks.clear()
        if not self.marks or step != self.step:
            self.marks.append((time.monotonic(), step))
        self.step = step

    def _position(self) -> str:
        return f"step {self.step}/{self.total}"

    def _figures(self) -> list[str]:
        """The last logged row, as one would read it out; what isn't known is left out."""
        row, figures = self.row, [f"loss {_loss(self.row.get('loss'))}"]
        formats = {
            "grad_norm": "grad norm {:.3f}",
            "lr": "lr {:.2e}",
            "tokens_per_second": "{:,.0f} tokens/s",
            "tokens_per_second_per_worker": "{:,.0f} tokens/s/worker",
            "memory_gib": "{:.2f} GiB",
        }
        if row.get("mfu") is not None:
            formats = {**formats, "mfu": "MFU {:.1%}"}
        if self.live is not None:  # on the bar, only what one looks up for: metrics.jsonl has the rest
            del formats["grad_norm"], formats["lr"]
        return figures + [form.format(row[key]) for key, form in formats.items() if row.get(key) is not None]

    def _left(self) -> list[str]:
        """The time left at the pace of the last updates, or nothing while there is no pace."""
        if len(self.marks) < 2 or self.step >= self.total:
            return []
        (then, first), (now, last) = self.marks[0], self.marks[-1]
        pace = (now - then) / (last - first)
        return [f"{_duration(max(0.0, pace * (self.total - self.step) - (time.monotonic() - now)))} left"]

    def _line(self, text: str) -> None:
        """One line, above the bar where there is one. Text is printed as it is: no markup, no wrapping in plain output."""
        if self.live is not None:
            self.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self.console.file, flush=True)


def summary_lines(summary: Mapping[str, Any]) -> str:
    """The block that closes a run, from the contents of summary.json (and `run_dir`, `random_data`, `tracker` where given)."""
    get = summary.get
    rows: list[tuple[str, str]] = []

    def add(name: str, value: Any, form: str = "{}") -> None:
        if value is not None:
            rows.append((name, form.format(value)))

    add("steps", get("steps"), "{:,}")
    add("tokens", get("tokens"), "{:,}")
    if get("random_data"):
        rows.append(("data", "random tokens: benchmark only"))
    add("loss", get("loss"), "{:.4f}")
    validation, unigram = get("validation_loss"), get("unigram_loss")
    add("validation loss", validation, "{:.4f}")
    add("unigram model", unigram, "{:.4f}")
    if validation is not None and unigram is not None:
        gap = unigram - validation
        rows[-1] = ("unigram model", f"{unigram:.4f} on the same text: the model is {abs(gap):.4f} {'below' if gap >= 0 else 'ABOVE'} it")
    wall, startup = get("wall_seconds"), get("startup_seconds")
    if wall is not None:
        rows.append(("time", _duration(wall) + (f", {_duration(startup)} of it start-up" if startup is not None else "")))
    add("tokens/s", get("tokens_per_second"), "{:,.0f}")
    if get("world") is not None:
        mesh = get("mesh")
        named = ", ".join(f"{key}={value}" for key, value in mesh.items()) if isinstance(mesh, Mapping) else mesh
        rows.append(("workers", f"{get('world')}" + (f" ({named})" if named else "")))
    if get("restarts"):
        found, again = sum(get("detection_seconds") or []), sum(get("restart_seconds") or [])
        rows.append(("restarts", f"{get('restarts')}: {get('steps_lost', 0)} steps lost, noticed within {_duration(found)}, "
                                 f"training again {_duration(again)} later (sums); goodput {get('goodput') or 0:.0%}"))  # fmt: skip
    else:
        add("restarts", get("restarts"))
    add("resumed from", get("resumed_from"), "step {}")
    if get("skipped_checkpoints"):
        rows.append(("skipped", _listed(get("skipped_checkpoints"))))
    run_dir = get("run_dir")
    add("run directory", run_dir)
    add("checkpoint", get("checkpoint"))
    if run_dir is not None:
        base = str(run_dir).rstrip("/")
        rows += [("metrics", f"{base}/metrics.jsonl"), ("config", f"{base}/config.yaml")]
        if get("tracker") == "tensorboard" or (get("tracker") is None and Path(base, "tensorboard").is_dir()):
            rows.append(("tensorboard", f"tensorboard --logdir {base}/tensorboard"))
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([str(get("status", "done")), *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _loss(value: float | None) -> str:
    """A loss that came as null was no number."""
    return "nan" if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    """As on a clock: 42 s, 3:05 min, 2:03:05 h."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"
