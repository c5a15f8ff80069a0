"""A batch: the jobs of a file, their states, and the run of those that are not done. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneavideo.batch import estimate, results, states
from tuneavideo.batch.job_file import BatchJob, read_jobs
from tuneavideo.batch.pool import Message, Pool, Runner
from tuneavideo.batch.roots import DiskRoot, Root, root_at
from tuneavideo.batch.worker import RUN_JOB
from tuneavideo.storage import atomic

OVER = ("done", "failed", "stopped")


@dataclass
class Batch:
    """The jobs of a file and what is known of them.

    Attributes:
        jobs: The jobs, by id, in the order in which they run.
        root: Folder of their runs.
        scores: Whether edits are scored.
        states: State of each job, by id.
        rows: Rows of the results, by id.
    """

    jobs: dict[str, BatchJob]
    root: Root
    scores: bool = False
    states: dict[str, str] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def of(cls, file: str | Path, out: str | None = None, *, scores: bool = False) -> Batch:
        """Read a job file and the states of its jobs.

        Args:
            file: Job file.
            out: Path or URL of the folder of the runs. None: `runs/<name of the file>`.
            scores: Whether to score the edits.

        Raises:
            SettingsError: The file is wrong.
            DiskError: The folder cannot be written, or has results of another program.
            MissingExtra: pyarrow, or the client of the object storage, is not installed.
        """
        jobs, root = read_jobs(file), root_at(out or f"runs/{Path(file).stem}")
        results.check(root)
        batch = cls({job.id: job for job in jobs}, root, scores)
        for job, found in zip(jobs, root.states(jobs, scores=scores), strict=True):
            batch.states[job.id] = found.state
            batch.rows[job.id] = found.rows or [states.failed_row(job, found.error, found.state)]
        return batch

    def due(self, *, retry: bool = False) -> list[BatchJob]:
        """Return the jobs to run: those not done, and with `retry` those that failed; begun ones first."""
        wanted = {"begun": 0, "waiting": 1} | ({"failed": 0} if retry else {})
        due = [job for job in self.jobs.values() if self.states[job.id] in wanted]
        return sorted(due, key=lambda job: (job.settings.base, wanted[self.states[job.id]]))

    def failures(self) -> dict[str, str]:
        """Return the reason of each job that failed, by the name of its run."""
        return {self.jobs[id].name: self.rows[id][0]["error"] for id, state in self.states.items() if state == "failed"}

    def plan(self, due: Sequence[BatchJob], workers: int | None = None) -> tuple[dict[str, Any], list[str]]:
        """Return what would be run, with estimated seconds and bytes, as values and as lines."""
        own = [self.root.path] if isinstance(self.root, DiskRoot) else []
        total, lines = estimate.summary(due, [*own, Path("runs")], workers)
        values = {"seconds": round(total.seconds), "bytes": round(total.bytes), "passing_bytes": round(total.passing)}
        if own:
            free = atomic.free(own[0])
            values["free_bytes"] = free
            lines.append(f"  {atomic.size(free)} are free there")
            if free < total.bytes + total.passing:
                lines.append("  warning: that is too little; make room, or give another --out")
        return values, lines

    def runner(
        self, due: Sequence[BatchJob], *, ray: str | None = None, workers: int | None = None, work: str = RUN_JOB
    ) -> Runner:
        """Return the workers for some jobs: on the Ray cluster at an address, otherwise processes of this machine."""
        self.root.prepare()
        pool = Pool(due)
        if ray is not None:
            from tuneavideo.batch.cluster import ClusterRunner

            return ClusterRunner(pool, due, self.root.place, ray, scores=self.scores, workers=workers, work=work)
        from tuneavideo.batch.local import LocalRunner

        place = self.root.place
        logs = self.root.path / "logs" if isinstance(self.root, DiskRoot) else atomic.cache_folder() / "batch"
        return LocalRunner(pool, place, logs, scores=self.scores, workers=workers, work=work)

    def run(self, runner: Runner) -> Iterator[Message | None]:
        """Run jobs and write the results file at the end, also when the batch is stopped.

        Yields:
            Messages of the workers, with `job`, `run` and `worker`; None when nothing has happened for a second.
        """
        try:
            for message in runner.messages():
                if message is None:
                    yield None
                    continue
                job = self.jobs[message["job"]]
                self._note(job, message)
                rows = {"rows": [*message["rows"]]} if "rows" in message else {}
                yield message | {"run": job.name, "time": round(time.time(), 3)} | rows
        finally:
            self.results = results.write(self.root, [row for rows in self.rows.values() for row in rows])

    results: str = ""

    def _note(self, job: BatchJob, message: Message) -> None:
        if message["state"] == "done":
            self.states[job.id], self.rows[job.id] = "done", message["rows"]
        elif message["state"] == "failed":
            self.states[job.id] = "failed"
            self.rows[job.id] = [states.failed_row(job, message["error"])]
        elif message["state"] in ("running", "stopped") and self.states[job.id] != "begun":
            self.states[job.id] = "begun"
            self.rows[job.id] = [states.failed_row(job, "", "begun")]
