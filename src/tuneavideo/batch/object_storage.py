"""A root in object storage, such as s3://bucket/runs, through fsspec. Imports no torch.

A worker works in a folder on its disk. It downloads what an earlier worker left, uploads new files after every
checkpoint and edit, and writes `complete.json` when all files of a finished job are there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from tuneavideo.batch import states
from tuneavideo.batch.job_file import BatchJob
from tuneavideo.batch.roots import RESULTS, Work, clip_on_disk
from tuneavideo.batch.states import JobState
from tuneavideo.errors import DiskError, MissingExtra, RunInUse, VideoError
from tuneavideo.storage import atomic
from tuneavideo.storage.run_files import slug
from tuneavideo.storage.run_folder import RunFolder

COMPLETE = "complete.json"
"""The object of a run that is written last."""
VERSIONS = ("ETag", "LastModified", "mtime", "created")
"""What file systems of fsspec say of the version of an object."""
NEVER: tuple[int, int] = (-1, -1)
"""Stamp of a file that may differ from its object."""
GIVE_UP = 300.0  # seconds of failed attempts after which an error of the storage is the job's
LONGEST_WAIT = 20.0  # seconds between two attempts
# Errors that another attempt does not mend.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, DiskError)

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class StorageRoot:
    """A root in object storage."""

    def __init__(self, url: str) -> None:
        self.place = url.rstrip("/")
        self.files, self.path = _file_system(self.place)

    def prepare(self) -> None:
        draft = f"{self.path}/.writable"
        with _disk_errors(self.place):
            persistently(lambda: self.files.pipe(draft, b""))
            persistently(lambda: self.files.rm_file(draft))

    def states(self, jobs: Sequence[BatchJob], *, scores: bool) -> list[JobState]:
        with _disk_errors(self.place):
            found = {self._below(path) for path in persistently(lambda: self._find(self.path))}
            marks = [name for job in jobs if (name := f"{job.name}/{COMPLETE}") in found]
            errors = [name for job in jobs if (name := f"{job.name}/error.txt") in found]
            contents = {
                name: text for part in _parts([*marks, *errors], 500) for name, text in self._read(part).items()
            }
        begun = {name.split("/")[0] for name in found}
        return [self._state(job, contents, begun, scores) for job in jobs]

    def _state(self, job: BatchJob, contents: Mapping[str, bytes], begun: set[str], scores: bool) -> JobState:
        if error := contents.get(f"{job.name}/error.txt"):
            return JobState("failed", error.decode().partition("\n")[0])
        if mark := contents.get(f"{job.name}/{COMPLETE}"):
            about = json.loads(mark)
            made = {(prompt, seed) for prompt, seed in about["edits"]}
            if made >= states.wanted(job) and (about["scored"] or not (scores and job.edits)):
                return JobState("done", rows=about["rows"])
        return JobState("begun" if job.name in begun else "waiting")

    @contextmanager
    def working(self, job: BatchJob) -> Generator[Work, None, None]:
        folder = scratch(self.place) / job.name
        mirror = Mirror(self.files, f"{self.path}/{job.name}", folder)
        with _alone(folder):
            with _disk_errors(self.place):
                mirror.download()
            run, is_whole = RunFolder(folder), False
            try:
                with clip_on_disk(job) as job:
                    yield job, run, mirror.upload
                is_whole = states.is_done(job, run, scores=False)
            finally:
                with _disk_errors(self.place):
                    mirror.upload()
                    if is_whole:
                        mirror.write(COMPLETE, json.dumps(_completed(job, run)).encode())
                mirror.remove()

    def write_error(self, job: BatchJob, error: Exception) -> None:
        with tempfile.TemporaryDirectory() as folder, suppress(Exception):  # its reason is in the message as well
            run = RunFolder(Path(folder))
            run.write_error(error)
            text = run.error.read_bytes()
            persistently(lambda: self.files.pipe(f"{self.path}/{job.name}/error.txt", text))

    def read_results(self) -> bytes | None:
        with _disk_errors(self.place):
            try:
                return persistently(lambda: self.files.cat_file(f"{self.path}/{RESULTS}"))
            except FileNotFoundError:
                return None

    def write_results(self, contents: bytes) -> str:
        with _disk_errors(self.place):
            persistently(lambda: self.files.pipe(f"{self.path}/{RESULTS}", contents))
        return f"{self.place}/{RESULTS}"

    def _find(self, path: str) -> list[str]:
        self.files.invalidate_cache()
        return self.files.find(path)

    def _below(self, path: str) -> str:
        return path.removeprefix(self.path).lstrip("/")

    def _read(self, names: Sequence[str]) -> dict[str, bytes]:
        """Read objects below the root, many at a time."""
        found = persistently(lambda: self.files.cat([f"{self.path}/{name}" for name in names]))
        return {self._below(path): contents for path, contents in found.items()}


class Mirror:
    """A run folder on a disk and its copy in object storage.

    Args:
        files: File system of fsspec.
        path: Place of the run in it.
        folder: Folder on the disk.
    """

    def __init__(self, files: Any, path: str, folder: Path) -> None:
        self.files, self.path, self.folder = files, path, folder
        self._record = folder.with_name(f".{folder.name}.stored.json")
        self.kept = dict[str, tuple[int, int]]()  # size and time of the files that are the same in both places

    def download(self) -> None:
        """Make the folder on the disk what the storage has.

        A folder is there already if a worker was killed or its upload failed. It is ahead of the storage, and stays,
        if nobody has changed the storage since. Otherwise it gets another name, so that no work is deleted.
        """
        stored = self._stored()
        if self.folder.exists():
            if self._known() == stored:
                self.kept = {name: NEVER for name in stored}
                return
            aside = next(p for n in count(1) if not (p := self.folder.with_name(f"{self.folder.name}.{n}")).exists())
            logger.warning("the storage was changed since a worker ended here; what it made is kept in %s", aside)
            self.folder.rename(aside)
        for name in stored:
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            persistently(lambda name=name, target=target: self.files.get_file(f"{self.path}/{name}", str(target)))
            self.kept[name] = _stamp(target)
        self._remember(stored)

    def _stored(self) -> dict[str, list[str]]:
        """Return size and version of the objects of the run, by name."""

        def find() -> dict[str, Any]:
            self.files.invalidate_cache()
            return self.files.find(self.path, detail=True)

        return {
            path.removeprefix(self.path).lstrip("/"): [str(about.get(key)) for key in ("size", *VERSIONS)]
            for path, about in persistently(find).items()
        }

    def _known(self) -> Any:
        """Return what the storage had after the last download or upload of the folder."""
        with suppress(OSError, ValueError):
            return json.loads(self._record.read_bytes())

    def _remember(self, stored: Mapping[str, list[str]]) -> None:
        self._record.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(self._record, json.dumps(stored))

    def upload(self) -> None:
        """Upload new and changed files, the checkpoints last, then remove the copies of files that are gone."""
        present = {
            file.relative_to(self.folder).as_posix(): file
            for file in sorted(self.folder.rglob("*"), key=lambda file: ("checkpoints" in file.parts, file))
            if file.is_file() and not any(part.startswith(".") for part in file.relative_to(self.folder).parts)
        }
        for name, file in present.items():
            stamp = _stamp(file)
            if self.kept.get(name) != stamp:
                persistently(lambda name=name, file=file: self.files.put_file(str(file), f"{self.path}/{name}"))
                self.kept[name] = stamp
        for name in [name for name in self.kept if name not in present and name != COMPLETE]:
            persistently(lambda name=name: self.files.rm_file(f"{self.path}/{name}"))
            del self.kept[name]
        self._remember(self._stored())

    def remove(self) -> None:
        """Remove the folder on the disk, all of which is uploaded."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._record.unlink(missing_ok=True)

    def write(self, name: str, contents: bytes) -> None:
        """Write an object beside the copies."""
        persistently(lambda: self.files.pipe(f"{self.path}/{name}", contents))


def _completed(job: BatchJob, run: RunFolder) -> dict[str, Any]:
    """Return the contents of `complete.json`: what was made, and the rows of the results."""
    rows = states.rows_of(job, run, job.name)
    return {"edits": sorted(run.edited()), "scored": not states.lacks_scores(run), "rows": rows}


def persistently(attempt: Callable[[], Result]) -> Result:
    """Return the result of an operation on the storage, tried again for `GIVE_UP` seconds while it fails.

    Raises:
        Exception: The operation fails for longer, or for a reason that another attempt does not mend.
    """
    end, wait = time.monotonic() + GIVE_UP, 0.5
    while True:
        try:
            return attempt()
        except LASTING:
            raise
        except Exception as error:
            is_passing = isinstance(error, OSError) or (_is_remote(error) and "Credentials" not in type(error).__name__)
            if not is_passing or time.monotonic() + wait > end:
                raise
            logger.warning("the storage does not answer (%s); tried again in %.0f s", error, wait)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)


@contextmanager
def fetched(job: BatchJob) -> Generator[BatchJob, None, None]:
    """Yield a job whose clip, a file in object storage, is copied to a disk for the block. Raises VideoError."""
    files, path = _file_system(job.video)
    with tempfile.TemporaryDirectory(prefix="tuneavideo-") as folder:
        target = Path(folder) / Path(path).name
        try:
            persistently(lambda: files.get_file(path, str(target)))
        except Exception as error:
            raise VideoError(f"{job.video} cannot be read: {_line(error)}") from error
        yield replace(job, values={**job.values, "video": str(target)})


@contextmanager
def _alone(folder: Path) -> Generator[None, None, None]:
    """Lock the copy of a run against other workers of this machine. Raises RunInUse."""
    locks = folder.parent.with_name(f"{folder.parent.name}-locks")
    locks.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(locks / folder.name, timeout=0, thread_local=False):
            yield
    except Timeout:
        raise RunInUse(f"{folder} is in use: another batch runs this job; wait until it is done, or stop it") from None


def scratch(place: str) -> Path:
    """Return the folder on this disk for copies of runs at `place`: in $TUNEAVIDEO_SCRATCH or the system's own."""
    return Path(os.environ.get("TUNEAVIDEO_SCRATCH") or tempfile.gettempdir()) / f"tuneavideo-{slug(place)}"


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        package = re.search(r"[Ii]nstall (\w+)", str(error))
        raise MissingExtra(f"{protocol}:// ({_line(error)})", "ray", package[1] if package else "") from None


@contextmanager
def _disk_errors(place: str) -> Generator[None, None, None]:
    """Turn errors of the storage into DiskError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or _is_remote(error):
            raise DiskError(
                f"{place} cannot be used: {_line(error)}; check its name, the access to it and its room"
            ) from error
        raise


def _is_remote(error: Exception) -> bool:
    """Return whether an error is of a client of object storage."""
    return type(error).__module__.partition(".")[0] in ("aiohttp", "botocore", "aiobotocore", "s3fs", "gcsfs", "adlfs")


def _stamp(file: Path) -> tuple[int, int]:
    about = file.stat()
    return about.st_size, about.st_mtime_ns


def _parts(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[at : at + size] for at in range(0, len(names), size)]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
