"""Work that stands for a job in tests of batches. Imports no torch."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tuneavideo.batch.job_file import BatchJob


def stub(job: BatchJob, root: str, scores: bool, stopping: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Work of a prompt: `sleep SECONDS`, `die`, `die once` or `raise`; each start is a line of ROOT/starts."""
    folder = Path(root)
    with (folder / "starts").open("a") as file:
        file.write(f"{job.id} {job.settings.prompt}\n")
    word, *rest = job.settings.prompt.split()
    yield {"state": "running", "stage": "tune", "number": 1, "total": 2}
    if word == "die" and not (rest and (folder / f"{job.id}.died").exists()):
        (folder / f"{job.id}.died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "raise":
        yield {"state": "failed", "error": "it was to fail"}
        return
    end = time.monotonic() + float(rest[0] if word == "sleep" else 0)
    while time.monotonic() < end and not stopping():
        time.sleep(0.01)
    if stopping():
        yield {"state": "stopped"}
    else:
        yield {"state": "done", "rows": [{"job": job.id, "run": job.name, "state": "done"}], "seconds": 0.0}
