"""Where a training step's time went, read off a profiler's trace. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DATA = "tp_trainer: data"  # what the bench calls the host's fetching of a batch
PARTS = ("compute", "optimizer", "exposed_communication", "data_wait", "host_gaps", "other")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")

Spans = list[tuple[float, float]]  # of time, in the trace's microseconds; disjoint and in order


@dataclass(frozen=True)
class Event:
    """Something that took time. Microseconds."""

    name: str
    category: str
    thread: object
    begin: float
    end: float
    correlation: object | None  # a launch and what it starts have one


@dataclass(frozen=True)
class Window:
    """The time that is looked at, how many steps lie in it, and what happened, by part."""

    begin: float
    end: float
    steps: int
    parts: Mapping[str, Sequence[Event]]  # the first that holds at a moment has it
    rest: str  # the part that has what is left


def split(trace: Iterable[Mapping[str, Any]]) -> dict[str, float | None] | None:
    """Seconds of a step, by what they went into. The parts exclude one another and add up to
    `step`; None: can't be told.

    Each moment of the device's time goes to the first of these that holds: a kernel computes
    (`compute`), one of the optimizer's does (`optimizer`), one of NCCL's or a copy between devices
    does (`exposed_communication`: nothing hides it), the host fetches a batch or copies it over
    (`data_wait`), nothing runs (`host_gaps`). Where the trace has no device, it is the host's time
    of which the optimizer and the fetching of batches can be told, and the rest is `other`.

    A step begins on the device when the last kernel launched in the step before has ended, so the
    trace's first step (a lead: it begins with an idle device) is no part of the result, which is
    the mean over the others.

    Args:
        trace: the `traceEvents` of a Chrome trace by torch.profiler, with a ProfilerStep span for
            each step.

    Returns:
        `steps`, `step` and each of PARTS; None where the trace has less than two steps.
    """
    events = [_event(each) for each in trace if each.get("ph") == "X"]
    annotations = [each for each in events if each.category == "user_annotation"]
    marks = sorted(
        (each for each in annotations if each.name.startswith("ProfilerStep#")),
        key=lambda each: each.begin,
    )
    if len(marks) < 2:
        return None
    host = [each for each in annotations if each.thread == marks[0].thread]
    on_device = any(each.category in ON_DEVICE for each in events)
    window = _of_device(events, host, marks) if on_device else _of_host(host, marks)
    whole = window.end - window.begin
    result: dict[str, float | None] = {"steps": window.steps, "step": whole / window.steps / 1e6}
    result |= dict.fromkeys(PARTS)
    taken: Spans = []
    for part, those in window.parts.items():
        inside = ((max(e.begin, window.begin), min(e.end, window.end)) for e in those)
        more = union([*taken, *inside])
        result[part] = (length(more) - length(taken)) / window.steps / 1e6
        taken = more
    result[window.rest] = (whole - length(taken)) / window.steps / 1e6
    return result


def _event(entry: Mapping[str, Any]) -> Event:
    begin, arguments = entry["ts"], entry.get("args", {})
    return Event(
        name=entry["name"],
        category=entry.get("cat", ""),
        thread=entry.get("tid"),
        begin=begin,
        end=begin + entry["dur"],
        correlation=arguments.get("correlation"),
    )


def _of_device(events: Sequence[Event], host: Sequence[Event], marks: Sequence[Event]) -> Window:
    """From the end of what the first step launched to the end of what the last one did."""
    device = [each for each in events if each.category in ON_DEVICE]
    launched = {
        each.correlation: each.begin
        for each in events
        if each.category in LAUNCHES and each.correlation is not None
    }
    second, last = marks[1].begin, max(each.end for each in device)
    lead = (e.end for e in device if launched.get(e.correlation, e.begin) < second)
    parts: dict[str, list[Event]] = {part: [] for part in PARTS[:3]}
    parts["data_wait"] = [each for each in host if each.name == DATA]
    for each in device:
        parts[_part(each)].append(each)
    begin = min(max(lead, default=second), last)
    return Window(begin, last, len(marks) - 1, parts, rest="host_gaps")


def _of_host(host: Sequence[Event], marks: Sequence[Event]) -> Window:
    """From the second step's begin to the last one's end."""
    parts = {
        "optimizer": [each for each in host if each.name.startswith("Optimizer.step#")],
        "data_wait": [each for each in host if each.name == DATA],
    }
    return Window(marks[1].begin, marks[-1].end, len(marks) - 1, parts, rest="other")


def _part(event: Event) -> str:
    """What an event on the device is part of."""
    if event.name.startswith("nccl") or "PtoP" in event.name:
        return "exposed_communication"
    if event.name.startswith("Memcpy HtoD"):
        return "data_wait"
    by_optimizer = "FusedOptimizer" in event.name or "adamw" in event.name.lower()
    return "optimizer" if by_optimizer else "compute"


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """What any of the spans covers; empty and reversed ones cover nothing."""
    joined: Spans = []
    for begin, end in sorted(span for span in spans if span[1] > span[0]):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def length(spans: Spans) -> float:
    return sum(end - begin for begin, end in spans)
