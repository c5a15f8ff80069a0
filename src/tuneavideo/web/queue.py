"""Queue of the jobs that were requested, in SQLite.

The queue does not record which job runs: the worker that runs a job holds a lock of the operating system.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from tuneavideo.errors import DiskError, RunError
from tuneavideo.storage import atomic
from tuneavideo.storage.run_files import slug

TABLE = """create table if not exists jobs (
    id integer primary key autoincrement, kind text not null, run text not null, settings text not null,
    created real not null, state text not null default 'waiting', error text not null default '',
    first integer, starts integer not null default 0
)"""
WAITING, PAUSED, DONE, FAILED, CANCELLED = "waiting", "paused", "done", "failed", "cancelled"
MOST_WAITING = 500
MOST_STARTS = 5  # of a job whose worker ends each time
RESERVE = 2**18  # bytes kept on the disk for records of the queue

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """A requested job.

    Attributes:
        id: Its number.
        kind: `tune`, `preview` (edits without tuning), `edit`, `evaluate`, `export` or `measure`.
        run: Name of the run folder in the root; empty for a measurement.
        settings: Values of its settings that are set.
        created: Time of the request, in seconds since the epoch.
        state: `waiting` (also while it runs), `paused`, `done`, `failed` or `cancelled`.
        error: Why it failed or waits, in one line.
        first: Number of the first edit that it makes; None before it starts.
        starts: Number of starts after which neither the job nor its worker ended in order.
    """

    id: int
    kind: str
    run: str
    settings: dict[str, Any]
    created: float
    state: str
    error: str
    first: int | None
    starts: int


class Queue:
    """The requests of a root folder, shared by the server and its workers."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / ".web"
        for name in ("locks", "pictures"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        # Without a write-ahead log the queue can be read on a full disk.
        self._run(lambda database: (database.execute("pragma journal_mode = delete"), database.execute(TABLE)))

    def add(self, kind: str, run: str, settings: Mapping[str, Any], *, is_new: bool = False) -> Request:
        """Add a request.

        Args:
            kind: Kind of the job.
            run: Name of its run; of a new run the stem of the name.
            settings: Values of its settings that are set.
            is_new: Whether the job makes the run.

        Raises:
            RunError: Too many jobs are waiting.
        """

        def insert(database: sqlite3.Connection) -> int:
            database.execute("begin immediate")
            (waiting,) = database.execute("select count(*) from jobs where state = ?", (WAITING,)).fetchone()
            if waiting >= MOST_WAITING:
                raise RunError(f"{waiting} jobs are waiting already; cancel some, or wait until some are done")
            name = self._free_name(run, database) if is_new else run
            values = (kind, name, json.dumps(dict(settings)), time.time())
            made = database.execute("insert into jobs (kind, run, settings, created) values (?, ?, ?, ?)", values)
            database.execute("commit")
            return made.lastrowid or 0

        return self.get(self._run(insert))

    def get(self, number: int) -> Request:
        """Return a request. Raises RunError when there is none."""
        found = self._select("where id = ?", number)
        if not found:
            raise RunError(f"there is no job {number}")
        return found[0]

    def all(self, run: str | None = None, limit: int = 200) -> list[Request]:
        """Return the last requests, newest first; of one run if it is given."""
        if run is not None:
            return self._select("where run = ? order by id desc limit ?", run, limit)
        return self._select("order by id desc limit ?", limit)

    def waiting(self) -> list[Request]:
        """Return the requests that wait or run, oldest first."""
        return self._select("where state = ? order by id", WAITING)

    @contextmanager
    def taken(self, except_for: Collection[int] = ()) -> Generator[Request | None, None, None]:
        """Lock the oldest request that no other worker has and that waits for no earlier one of its run.

        Yields:
            The request; None if there is none.
        """
        runs = set[str]()
        for request in self.waiting():
            is_first, _ = request.run not in runs, runs.add(request.run)
            if not is_first or request.id in except_for:
                continue
            lock = FileLock(self.lock_file(request.id), timeout=0)
            with suppress(Timeout):
                lock.acquire()
                try:
                    current = self.get(request.id)
                    if current.state == WAITING:
                        yield current
                        return
                finally:
                    lock.release()
        yield None

    def lock_file(self, number: int) -> Path:
        return self.folder / "locks" / f"job-{number}.lock"

    def picture(self, number: int) -> Path:
        """Return the file of the picture that a job shows while it samples."""
        return self.folder / "pictures" / f"{number}.jpg"

    def started(self, request: Request) -> None:
        """Count a start, until `settled` or `set_state` is called."""
        self._update("starts = starts + 1", request.id)

    def settled(self, request: Request, why: str = "") -> None:
        """Record that a request waits again after its worker stopped in order."""
        self._update("starts = 0, error = ?", request.id, why)

    def begin_edits(self, request: Request, number: int) -> int:
        """Record the number of the first edit of a request, unless it is recorded, and return what is recorded."""
        self._update("first = coalesce(first, ?)", request.id, number)
        first = self.get(request.id).first
        assert first is not None, "it was just recorded"
        return first

    def set_state(self, number: int, state: str, error: str = "") -> None:
        """Set the state of a request; to wait again, it forgets its error and its starts."""
        self._update("state = ?, error = ?, starts = 0", number, state, error)

    def finish(self, number: int, state: str, error: str = "") -> None:
        """Set the state of a request that waits; one that was cancelled meanwhile keeps its state."""
        change = "update jobs set state = ?, error = ?, starts = 0 where id = ? and state = ?"
        self._run(lambda database: database.execute(change, (state, error, number, WAITING)))

    def _free_name(self, stem: str, database: sqlite3.Connection) -> str:
        """Return the first `<stem>-<n>` that is neither a folder nor requested."""
        names, number = (
            {name for (name,) in database.execute("select run from jobs where kind in ('tune', 'preview')")},
            1,
        )
        while (name := f"{slug(stem)}-{number}") in names or (self.root / name).exists():
            number += 1
        return name

    def _select(self, condition: str, *values: Any) -> list[Request]:
        columns = "id, kind, run, settings, created, state, error, first, starts"
        rows = self._run(lambda each: each.execute(f"select {columns} from jobs {condition}", values).fetchall())
        return [Request(number, kind, run, json.loads(settings), *rest) for number, kind, run, settings, *rest in rows]

    def _update(self, change: str, number: int, *values: Any) -> None:
        self._run(lambda database: database.execute(f"update jobs set {change} where id = ?", (*values, number)))

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do some work in the database. On a full disk the reserved bytes are given up, so that ends can be recorded.

        Raises:
            DiskError: The database cannot be read or written.
        """
        reserve = self.folder / "reserve"
        while True:
            try:
                with closing(sqlite3.connect(self._file, timeout=10, isolation_level=None)) as database:
                    done = work(database)
                break
            except sqlite3.Error as error:
                if not reserve.exists():
                    raise DiskError(f"{self._file} cannot be used: {error}; make room, or make it writable") from error
                reserve.unlink(missing_ok=True)
        if not reserve.exists() and atomic.free(self.folder) > 8 * RESERVE:
            with suppress(DiskError):
                atomic.write(reserve, bytes(RESERVE))
        return done

    @property
    def _file(self) -> Path:
        return self.folder / "queue.sqlite"
