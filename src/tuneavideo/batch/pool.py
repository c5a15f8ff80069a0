"""Jobs that wait for a worker, and those whose worker ended."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from tuneavideo.batch.job_file import BatchJob

MOST_STARTS = 5  # of a job whose worker ends each time
Message = dict[str, Any]


class Runner(Protocol):
    """Workers that run the jobs of a pool."""

    def messages(self) -> Iterator[Message | None]:
        """Yield what `run_job` yields, with `job` and `worker`; None when nothing has happened for a second."""
        ...

    def stop(self) -> None:
        """Let workers stop after their current steps."""
        ...

    def kill(self) -> None:
        """End workers at once."""
        ...


class Pool:
    """The jobs that no worker has yet; several threads may use it."""

    def __init__(self, jobs: Iterable[BatchJob]) -> None:
        self._waiting, self._starts, self._lock = deque(jobs), Counter[str](), threading.Lock()
        self.is_stopped = False

    def take(self) -> BatchJob | None:
        """Remove the next job; None if there is none, or the batch is stopped."""
        with self._lock:
            return self._waiting.popleft() if self._waiting and not self.is_stopped else None

    def has_more(self) -> bool:
        """Return whether a job waits and is to be run."""
        return bool(self._waiting) and not self.is_stopped

    def lost(self, job: BatchJob, why: str) -> Message:
        """Let a job wait again after its worker ended, or fail after `MOST_STARTS` times; return the message."""
        with self._lock:
            self._starts[job.id] += 1
            if self._starts[job.id] < MOST_STARTS:
                self._waiting.appendleft(job)
                return {"state": "lost", "error": why}
        return {
            "state": "failed",
            "error": f"its worker ended {MOST_STARTS} times ({why}), perhaps for lack of memory; take fewer frames or "
            "a lower resolution",
        }
