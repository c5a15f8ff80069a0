"""Memory of this machine. No torch here."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import psutil

CGROUP = Path("/sys/fs/cgroup/memory.max")  # what a container may take


def release_memory() -> None:
    """Memory that is free goes back to the system, gaps between blocks too."""
    if hasattr(c := libc(), "malloc_trim"):
        c.malloc_trim(0)


def libc() -> Any:
    """The C library of this process, on Linux."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def free_and_total() -> tuple[int, int]:
    """Free and whole memory in bytes, as far as the container and the process may use it."""
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
