"""Memory of this machine. No torch here."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

CGROUP = Path("/sys/fs/cgroup/memory.max")  # what a container may take


# Of glibc's mallopt: how much free memory at the end is given back, and from which size a block is asked of the system
# by itself. It moves the second itself, up to 32 MB, unless told.
TRIM, MAP = -1, -3
KEEP, RETURN = 2**31 - 1, 2**22


@contextmanager
def freed_memory(*, kept: bool) -> Generator[None, None, None]:
    """Memory that is freed stays with the process for the next step to take, until the end of the block, or goes back.

    What goes back is cleared page by page when it is asked for again: a seventh of a tuning step that computes nothing
    twice. What is kept has gaps. Only glibc is told; elsewhere nothing happens.
    """
    try:
        give_back()
        _tell(KEEP if kept else RETURN)
        yield
    finally:
        _tell(RETURN)
        give_back()


def give_back() -> None:
    """Memory that is free goes back to the system, gaps between blocks too."""
    if hasattr(c := libc(), "malloc_trim"):
        c.malloc_trim(0)


def _tell(size: int) -> None:
    if hasattr(c := libc(), "mallopt"):
        for option in (TRIM, MAP):
            c.mallopt(option, size)


def libc() -> Any:
    """The C library of this process, on Linux."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def memory() -> tuple[int, int]:
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
