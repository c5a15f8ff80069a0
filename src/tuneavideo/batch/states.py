"""State and results of a job, from its run folder: whether it is done, and what it made. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from tuneavideo.batch.job_file import BatchJob
from tuneavideo.errors import TuneAVideoError
from tuneavideo.storage.run_folder import LOCK, NEW, RunFolder

State = Literal["waiting", "begun", "failed", "done"]


@dataclass(frozen=True)
class JobState:
    """State of a job before it runs.

    Attributes:
        state: `waiting`, `begun` (it was stopped, and continues), `failed` or `done`.
        error: Why it failed, in one line.
        rows: Its results if it is done.
    """

    state: State
    error: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


def wanted(job: BatchJob) -> set[tuple[str, int]]:
    """Return prompt and seed of the edits of a job."""
    return {*product(job.edits, job.settings.seeds)}


def state_of(job: BatchJob, run: RunFolder, *, scores: bool) -> JobState:
    """Return the state of a job by its run folder.

    Args:
        job: The job.
        run: Its folder, which need not exist.
        scores: Whether edits without scores are unfinished.
    """
    error = run.last_error
    if error:
        return JobState("failed", error)
    if not run.settings.is_file():
        return JobState("waiting")
    try:
        if is_done(job, run, scores=scores):
            return JobState("done", rows=rows_of(job, run))
    except (TuneAVideoError, OSError, ValueError) as damage:
        return JobState("failed", str(damage))
    return JobState("begun")


def is_done(job: BatchJob, run: RunFolder, *, scores: bool) -> bool:
    """Return whether a run is tuned, has all edits of a job, and with `scores` also their scores."""
    is_made = run.is_finished(job.settings) and run.edited() >= wanted(job)
    return is_made and not (scores and job.edits and lacks_scores(run))


def lacks_scores(run: RunFolder) -> bool:
    """Return whether an edit has no scores, or was made after them."""
    scored = {edit["folder"] for edit in (run.read_scores() or {"edits": []})["edits"]}
    return any(edit.name not in scored or run.is_newer(edit) for edit in run.whole_edits())


def rows_of(job: BatchJob, run: RunFolder, name: str = "") -> list[dict[str, Any]]:
    """Return the results of a finished job, one row for each of its edits; a single row without edits.

    Args:
        job: The job.
        run: Its run folder.
        name: Name of the folder; by default that of `run`.
    """
    steps = run.steps()
    tuned = {
        "steps": run.tuned_steps,
        "loss": steps[-1]["loss"] if steps else None,
        "seconds_tuning": sum(step["seconds"] for step in steps),
        "peak_memory": max((step["memory"] for step in steps), default=None),
    }
    common, scores = described(job) | {"state": "done"} | tuned, run.read_scores() or {"edits": []}
    by_folder, made, own = {edit["folder"]: edit["scores"] for edit in scores["edits"]}, wanted(job), list[Any]()
    for folder in run.whole_edits():
        edit = run.read_edit(folder)
        if (edit["prompt"], edit["seed"]) in made:
            path = f"{name or run.path.name}/edits/{folder.name}/{run.read_clip(folder).name}"
            values = {metric: score["value"] for metric, score in by_folder.get(folder.name, {}).items() if score}
            own.append(common | {"edit": edit["prompt"], "edit_seed": edit["seed"], "file": path} | values)
    return own or [common]


def failed_row(job: BatchJob, error: str, state: str = "failed") -> dict[str, Any]:
    """Return the row of a job without results."""
    return described(job) | {"state": state, "error": error}


def described(job: BatchJob) -> dict[str, Any]:
    """Return the columns of a row that follow from the job file."""
    settings = {name: value for name, value in job.written.items() if name not in ("video", "prompt", "edit")}
    return {
        "job": job.id, "run": job.name, "video": str(job.written["video"]), "prompt": str(job.written["prompt"]),
        "settings": json.dumps(settings, sort_keys=True),
    }  # fmt: skip


def forget_error(run: RunFolder) -> None:
    """Remove the error of a job that failed before its run began, so that the folder can be used."""
    files = {file.name for file in run.path.iterdir()} if run.path.is_dir() else set[str]()
    if files <= {run.error.name, LOCK, NEW}:
        run.error.unlink(missing_ok=True)
