"""Worker process: runs the jobs that it reads from stdin, one after the other, and keeps their base loaded.

    python -m tuneavideo.batch.worker ROOT [--scores] [--work MODULE:FUNCTION]

A line of JSON on stdin is a job, or stops the current one. Messages are lines of JSON on stdout. When stdin ends, since
the batch ended, the worker stops after the current step.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from tuneavideo.batch.job_file import BatchJob

LAST_WAIT = 30.0  # seconds after the end of stdin at which a worker that still computes is ended
RUN_JOB = "tuneavideo.batch.job_run:run_job"


class Worker:
    """The loop of a worker, and the thread that reads stdin."""

    def __init__(self, output: IO[str], run: Callable[[BatchJob, Callable[[], bool]], Any]) -> None:
        self.output, self.run_job = output, run
        self.jobs, self.is_stopping = queue.Queue[BatchJob | None](), False

    def listen(self, stream: IO[str]) -> None:
        """Read jobs until stdin ends."""
        for line in stream:
            message = json.loads(line)
            if message.get("stop"):
                self.is_stopping = True
            else:
                self.jobs.put(BatchJob.of_message(message))
        self.is_stopping = True
        self.jobs.put(None)
        time.sleep(LAST_WAIT)
        os._exit(1)

    def run(self) -> None:
        """Run jobs until stdin ends, or one ran out of memory: the next ones get a new process."""
        while job := self.jobs.get():
            for message in self.run_job(job, lambda: self.is_stopping):
                self.output.write(json.dumps(message) + "\n")
                self.output.flush()
                if message.get("restart"):
                    return


def prepare() -> Any:
    """Import what jobs need, and return a context in which the base is kept."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when it is imported
    from tuneavideo.jobs import tune  # noqa: F401
    from tuneavideo.models import pipelines, quiet

    quiet.silence_libraries()
    return pipelines.keeping_base()


def function_at(place: str) -> Any:
    """Return the function at `MODULE:FUNCTION`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def main() -> None:
    """Run the worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root")
    parser.add_argument("--scores", action="store_true")
    parser.add_argument("--work", default=RUN_JOB)
    options = parser.parse_args()
    with suppress(BrokenPipeError), os.fdopen(os.dup(1), "w", encoding="utf-8") as output:
        os.dup2(2, 1)  # libraries may print
        work = function_at(options.work)
        worker = Worker(output, lambda job, stopping: work(job, options.root, options.scores, stopping))
        threading.Thread(target=worker.listen, args=(sys.stdin,), daemon=True).start()
        if options.work != RUN_JOB:
            worker.run()
            return
        with prepare():
            worker.run()


if __name__ == "__main__":
    main()
