"""One job, from its beginning or from where it was stopped, in a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

from tuneavideo import api
from tuneavideo.batch import states
from tuneavideo.batch.job_file import BatchJob
from tuneavideo.batch.roots import root_at
from tuneavideo.errors import MemoryShort, RunInUse, error_line
from tuneavideo.progress import Progress
from tuneavideo.storage.run_folder import RunFolder

INTERVAL = 0.5  # seconds between two messages of one stage
PATIENCE = 60.0  # seconds for which a job waits for another process that works in its folder
Messages = Generator[dict[str, Any], None, None]


def run_job(job: BatchJob, root: str, scores: bool, stopping: Callable[[], bool]) -> Messages:
    """Run a job to its end, or until `stopping` returns True after a step.

    Args:
        job: The job.
        root: Path or URL of the folder of the runs.
        scores: Whether to score its edits.
        stopping: Function that is called after every step.

    Yields:
        A dict with `state`: `running` with the progress, and at the end `done` with `rows`, `failed` with `error` and
        with `restart` (whether memory ran out, which the process may not get back), or `stopped`.
    """
    place, began = root_at(root), time.perf_counter()
    last, stage = 0.0, ""
    try:
        with place.working(job) as (job, run, keep), closing(_waiting(job, run, scores)) as events:
            for each in events:
                if _is_worth_keeping(job, each):
                    keep()
                now = time.perf_counter()
                if each.stage and (each.stage != stage or now - last > INTERVAL):
                    yield {"state": "running", **progress_of(each)}
                    last, stage = now, each.stage
                if stopping():
                    break
            events.close()  # a tuning that is stopped writes a checkpoint
            done = states.is_done(job, run, scores=scores)
            rows = states.rows_of(job, run, job.name) if done else []
        seconds = round(time.perf_counter() - began, 3)
        yield {"state": "done", "rows": rows, "seconds": seconds} if done else {"state": "stopped"}
    except RunInUse as error:
        yield {"state": "failed", "error": str(error)}
    except Exception as error:
        place.write_error(job, error)
        yield {"state": "failed", "error": error_line(error), "restart": isinstance(error, MemoryShort)}


def progress_of(each: Progress) -> dict[str, Any]:
    """Return the parts of an event that are shown."""
    shown = {"stage": each.stage, "number": each.number, "total": each.total}
    return shown | ({"loss": each.step.loss, "memory": each.step.memory} if each.step else {})


def _waiting(job: BatchJob, run: RunFolder, scores: bool) -> Generator[Progress, None, None]:
    """Yield the events of a job; while another process works in its folder, wait for at most `PATIENCE` seconds."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            yield from _complete(job, run, scores)
            return
        except RunInUse:
            if time.monotonic() > end:
                raise
            yield Progress("")
            time.sleep(1)


def _complete(job: BatchJob, run: RunFolder, scores: bool) -> Generator[Progress, None, None]:
    """Yield the events of what a run folder lacks."""
    states.forget_error(run)
    if not run.settings.is_file():
        yield from _closing(api.Job.tune(job.settings, out=run.path))
    elif not states.is_done(job, run, scores=False):
        settings = api.resumed_settings(run.path, {"edit": job.edits})
        yield from _closing(api.Job.tune(settings, resume=run.path))
    if scores and job.edits and states.lacks_scores(run):
        yield from _closing(api.Job.evaluate([run.path]))
    if run.error.is_file():
        with run.job():  # a success removes it
            pass


def _closing(job: api.Job) -> Generator[Progress, None, None]:
    """Yield the events of a job, and close it with this generator."""
    try:
        yield from job
    finally:
        job.close()


def _is_worth_keeping(job: BatchJob, each: Progress) -> bool:
    """Return whether a checkpoint or an edit was finished."""
    is_checkpoint = each.step is not None and each.step.number % job.settings.checkpointing_steps == 0
    return is_checkpoint or (each.path is not None and each.stage in ("tune", "edit"))
