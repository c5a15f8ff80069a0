"""Time of a call, and its peak memory minus the memory before."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Peak memory since its creation minus the memory then: resident on a CPU, allocated on a GPU.

    Linux can reset its peak; elsewhere the peak is that of the whole process. What the process keeps
    though it is free is not held.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            _release_memory()
            if _RESET.exists():
                _RESET.write_text("5")
            self.base = psutil.Process().memory_info().rss

    def above(self) -> int:
        """Return the difference in bytes."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() - self.base
        return max(0, _high_water() - self.base)

    def timed(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Return wall seconds of one call, with synchronisation of the device, and CPU seconds of this process.

        The second tells what the first would be if nothing else ran here.
        """
        began, before = time.perf_counter(), time.process_time()
        run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, time.process_time() - before


def _high_water() -> int:
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _release_memory() -> None:
    """Return free memory to the system, gaps between blocks included; on Linux with glibc only."""
    if sys.platform == "linux" and hasattr(c := ctypes.CDLL(None), "malloc_trim"):
        c.malloc_trim(0)
