"""What this machine has to offer, found out without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def gpus_here() -> int:
    """The NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([each for each in visible.split(",") if each.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False
    )
    return (
        sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
        if listing.returncode == 0
        else 0
    )


def free_host_memory() -> int | None:
    """Bytes that could still be allocated here, swap left out: the machine's or, if less, the
    container's. None if neither says.
    """
    known = []
    try:
        fields = dict(
            line.split(":", 1)
            for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        )
        known.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    try:
        group = Path("/sys/fs/cgroup")
        pages = dict(
            line.split()
            for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        )
        # page cache can go
        used = int((group / "memory.current").read_text(encoding="utf-8")) - int(
            pages["inactive_file"]
        )
        known.append(
            int((group / "memory.max").read_text(encoding="utf-8")) - used
        )  # `max` is no number: no limit
    except (OSError, KeyError, ValueError):
        pass
    return min(known) if known else None
