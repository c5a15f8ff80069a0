"""Memory of this machine, for modules that do not import torch."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup/memory.max")  # limit of a container


def free_and_total() -> tuple[int, int]:
    """Return free and total memory in bytes, within the limits of the container and the process."""
    now = psutil.virtual_memory()
    free, total = now.available, now.total
    if CGROUP.is_file() and (limit := CGROUP.read_text().strip()).isdigit():
        total = min(total, int(limit))
    if sys.platform != "win32":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            total, free = min(total, limit), min(free, max(0, limit - psutil.Process().memory_info().vms))
    return min(free, total), total
