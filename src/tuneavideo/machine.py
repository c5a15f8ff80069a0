"""Memory of this machine, in bytes. No torch here."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup/memory.max")  # what a container may take


def memory() -> tuple[int, int]:
    """Free and whole memory, as far as the container and the process may use it."""
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
