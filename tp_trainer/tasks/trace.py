"""Where a training step's time went, read off a profiler's trace. A function of a list of events; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DATA = "tp_trainer: data"  # what the bench calls the host's fetching of a batch
PARTS = ("compute", "optimizer", "exposed_communication", "data_wait", "host_gaps", "other")

Spans = list[tuple[float, float]]  # of time, in the trace's microseconds; disjoint and in order


def split(events: Iterable[Mapping[str, Any]]) -> dict[str, float | None] | None:
    """Seconds of a step, by what they went into. The parts exclude one another and add up to `step`; None: can't be told.

    Each moment of the device's time goes to the first of these that holds: a kernel computes (`compute`), one of the
    optimizer's does (`optimizer`), one of NCCL's or a copy between devices does (`exposed_communication`: nothing hides it),
    the host fetches a batch or copies it over (`data_wait`), nothing runs (`host_gaps`). Where the trace has no device,
    it is the host's time of which the optimizer and the fetching of batches can be told, and the rest is `other`.

    A step begins on the device when the last kernel launched in the step before has ended, so the trace's first step
    (a lead: it begins with an idle device) is no part of the result, which is the mean over the others.

    Args:
        events: the `traceEvents` of a Chrome trace by torch.profiler, with a ProfilerStep span for each step.

    Returns:
        `steps`, `step` and each of PARTS; None where the trace has less than two steps.
    """
    whole = [event for event in events if event.get("ph") == "X"]
    marks = sorted((e for e in whole if e["name"].startswith("ProfilerStep#") and e["cat"] == "user_annotation"), key=lambda e: e["ts"])
    if len(marks) < 2:
        return None
    host = [e for e in whole if e.get("cat") == "user_annotation" and e.get("tid") == marks[0].get("tid")]
    fetching = [e for e in host if e["name"] == DATA]
    device = [e for e in whole if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if device:
        begin, end = _device_window(whole, device, [e["ts"] for e in marks])
        kinds: dict[str, list[Mapping[str, Any]]] = {part: [] for part in PARTS[:3]} | {"data_wait": fetching}
        for event in device:
            kinds[_kind(event)].append(event)
    else:
        begin, end = marks[1]["ts"], marks[-1]["ts"] + marks[-1]["dur"]
        kinds = {"optimizer": [e for e in host if e["name"].startswith("Optimizer.step#")], "data_wait": fetching}
    steps, taken = len(marks) - 1, list[tuple[float, float]]()
    result: dict[str, float | None] = {"steps": steps, "step": (end - begin) / steps / 1e6} | dict.fromkeys(PARTS)
    for part, those in kinds.items():
        more = union([*taken, *((max(e["ts"], begin), min(e["ts"] + e["dur"], end)) for e in those)])
        result[part] = (length(more) - length(taken)) / steps / 1e6
        taken = more
    result["host_gaps" if device else "other"] = (end - begin - length(taken)) / steps / 1e6
    return result


def _kind(event: Mapping[str, Any]) -> str:
    name = event["name"]
    if name.startswith("nccl") or "PtoP" in name:
        return "exposed_communication"
    if name.startswith("Memcpy HtoD"):
        return "data_wait"
    return "optimizer" if "FusedOptimizer" in name or "adamw" in name.lower() else "compute"


def _device_window(whole: Sequence[Mapping[str, Any]], device: Sequence[Mapping[str, Any]], starts: Sequence[float]) -> tuple[float, float]:
    """From the end of what the first step launched to the end of what the last one did. A launch and what it starts are one correlation."""
    second = starts[1]
    launched = {e["args"]["correlation"]: e["ts"] for e in whole if e.get("cat") in ("cuda_runtime", "cuda_driver") and _correlated(e)}
    ends = [(launched.get(e["args"]["correlation"], e["ts"]) if _correlated(e) else e["ts"], e["ts"] + e["dur"]) for e in device]
    last = max(end for _, end in ends)
    return min(max((end for launch, end in ends if launch < second), default=second), last), last


def _correlated(event: Mapping[str, Any]) -> bool:
    return "correlation" in event.get("args", {})


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
