"""Roots: folders that hold the run folders of a batch. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

from tuneavideo.batch.job_file import BatchJob
from tuneavideo.batch.states import JobState, state_of
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import OTHER_PLACE, RunFolder

RESULTS = "results.parquet"
Work = tuple[BatchJob, RunFolder, Callable[[], None]]


class Root(Protocol):
    """A folder with a run folder for each job, and the results."""

    place: str
    """Path or URL."""

    def prepare(self) -> None:
        """Raise DiskError when the root cannot be written."""
        ...

    def states(self, jobs: Sequence[BatchJob], *, scores: bool) -> list[JobState]:
        """Return the state of each job."""
        ...

    def working(self, job: BatchJob) -> AbstractContextManager[Work]:
        """Yield the job with its clip on a disk, its run folder there, and a function that keeps what it holds now."""
        ...

    def write_error(self, job: BatchJob, error: Exception) -> None:
        """Write `error.txt` into the folder of a job, if it can be written."""
        ...

    def read_results(self) -> bytes | None:
        """Return the results file; None if there is none."""
        ...

    def write_results(self, contents: bytes) -> str:
        """Write the results file and return its place. Raises DiskError."""
        ...


class DiskRoot:
    """A root on a disk, which the workers of other machines see at the same path, for example by NFS."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.place = str(path)

    def prepare(self) -> None:
        atomic.check_writable(self.path, OTHER_PLACE)

    def states(self, jobs: Sequence[BatchJob], *, scores: bool) -> list[JobState]:
        return [state_of(job, RunFolder(self.path / job.name), scores=scores) for job in jobs]

    @contextmanager
    def working(self, job: BatchJob) -> Generator[Work, None, None]:
        with clip_on_disk(job) as job:
            yield job, RunFolder(self.path / job.name), lambda: None

    def write_error(self, job: BatchJob, error: Exception) -> None:
        RunFolder(self.path / job.name).write_error(error)

    def read_results(self) -> bytes | None:
        file = self.path / RESULTS
        return file.read_bytes() if file.is_file() else None

    def write_results(self, contents: bytes) -> str:
        atomic.write(self.path / RESULTS, contents)
        return f"{self.place}/{RESULTS}"


def clip_on_disk(job: BatchJob) -> AbstractContextManager[BatchJob]:
    """Yield the job with a path of its clip, which is fetched if it is in object storage."""
    if "://" not in job.video:
        return nullcontext(job)
    from tuneavideo.batch.object_storage import fetched

    return fetched(job)


def root_at(place: str) -> Root:
    """Return the root at a path or URL."""
    if "://" not in place:
        return DiskRoot(place)
    from tuneavideo.batch.object_storage import StorageRoot

    return StorageRoot(place)
