"""Job files: clips with their settings and prompts, in YAML or CSV. Imports no torch."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, get_origin

from pydantic import Field

from tuneavideo import api
from tuneavideo.config import checked, parse_values, parse_yaml
from tuneavideo.errors import SettingsError
from tuneavideo.setting_types import Settings
from tuneavideo.settings import TuneSettings
from tuneavideo.storage.run_files import slug

ID_LENGTH = 12
NOT_PART_OF_ID = {"edit"}  # a job that gets another prompt is not tuned again
ALIASES = {"edits": "edit", "clip": "video", "caption": "prompt"}


class JobFile(Settings):
    """Contents of a YAML job file."""

    defaults: Mapping[str, Any] = Field(default_factory=dict)
    """Settings of all clips."""
    clips: list[dict[str, Any]] = Field(min_length=1)
    """Settings of each clip, which precede the others: `video`, `prompt`, `edit` and any option of `tune`."""
    grid: Mapping[str, list[Any]] = Field(default_factory=dict)
    """Values of settings; each clip is run with every combination of them, but for settings of its own."""


@dataclass(frozen=True)
class BatchJob:
    """A clip to tune with some settings, and the edits to make of it.

    Attributes:
        values: Settings that are given, by name, with the clip's path as workers open it.
        written: The same as the file has them, from which the id follows.
        edits: Prompts of the edits.
        where: Place in the job file.
    """

    values: Mapping[str, Any]
    written: Mapping[str, Any]
    edits: tuple[str, ...]
    where: str

    @cached_property
    def id(self) -> str:
        """Digest of the settings without the prompts of edits."""
        own = {name: value for name, value in self.written.items() if name not in NOT_PART_OF_ID}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:ID_LENGTH]

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return f"{slug(PurePosixPath(self.video.replace(os.sep, '/')).stem)}-{self.id}"

    @property
    def video(self) -> str:
        return str(self.values["video"])

    @cached_property
    def settings(self) -> TuneSettings:
        """The settings with those of base and preset. Raises SettingsError when they contradict each other."""
        try:
            return api.merge_settings({**self.values, "edit": self.edits}, None)
        except SettingsError as error:
            raise SettingsError(f"{self.where}: {error}") from None

    def as_message(self) -> dict[str, Any]:
        """Return the job as JSON values, for a worker."""
        values = {name: value for name, value in self.values.items() if name != "edit"}
        return {"values": values, "written": dict(self.written), "edits": list(self.edits), "where": self.where}

    @classmethod
    def of_message(cls, message: Mapping[str, Any]) -> BatchJob:
        return cls(message["values"], message["written"], tuple(message["edits"]), message["where"])


def read_jobs(path: str | Path) -> list[BatchJob]:
    """Read the jobs of a file, each once and ordered by base, so that a worker loads few bases.

    Two jobs that differ only in the prompts of edits are one job with all the prompts.

    Args:
        path: A `.csv` file with a row per job, or a YAML file with `clips`, `defaults` and `grid`. A relative `video`
            is in the file's folder if it exists there, otherwise in the current folder.

    Raises:
        SettingsError: The file cannot be read, or a setting is wrong, unknown or missing; the message has its place.
    """
    path = Path(path)
    rows = _rows_of_csv(path) if path.suffix.lower() == ".csv" else _rows_of_yaml(path)
    jobs = dict[str, BatchJob]()
    for where, written in rows:
        job = _job(path, where, written)
        earlier = jobs.get(job.id)
        if earlier:
            job = replace(earlier, edits=tuple(dict.fromkeys((*earlier.edits, *job.edits))))
        jobs[job.id] = job
    if not jobs:
        raise SettingsError(f"{path}: found no job; give a row for each clip, with video and prompt")
    for job in jobs.values():
        _ = job.settings  # raises for a wrong one
    return sorted(jobs.values(), key=lambda job: job.settings.base)


def _job(path: Path, where: str, written: Mapping[str, Any]) -> BatchJob:
    if missing := [name for name in ("video", "prompt") if not written.get(name)]:
        raise SettingsError(f"{where}: {missing[0]} is missing; a job needs video and prompt, such as 'video: dog.mp4'")
    values = dict(written)
    video = str(values["video"])
    if "://" not in video:
        neighbour = path.parent / video
        values["video"] = os.path.abspath(video if os.path.exists(video) and not neighbour.exists() else neighbour)
    return BatchJob(values, written, tuple(written.get("edit", ())), where)


def _rows_of_yaml(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the settings of each job of a YAML file."""
    contents = checked(JobFile, parse_yaml(path), str(path))
    defaults = _parsed(contents.defaults, f"{path}: defaults")
    grid = {
        name: [_parsed({name: value}, f"{path}: grid")[_known(name)] for value in values]
        for name, values in contents.grid.items()
    }
    grid = {_known(name): values for name, values in grid.items()}
    for number, clip in enumerate(contents.clips, 1):
        where = f"{path}: clip {number}"
        own = _parsed(clip, where)
        varied = {name: values for name, values in grid.items() if name not in own}
        for combination in product(*varied.values()):
            yield where, {**defaults, **dict(zip(varied, combination, strict=True)), **own}


def _rows_of_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the settings of each row of a CSV file; empty cells are not set."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as text:
            names, *rows = [*csv.reader(text)] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise SettingsError(f"{path}: cannot be read as CSV: {getattr(error, 'strerror', None) or error}") from None
    for number, row in enumerate(rows, 2):
        where, cells = f"{path}: row {number}", dict[str, Any]()
        if len(row) > len(names):
            raise SettingsError(f"{where}: found {len(row)} cells under {len(names)} names; put texts in quotes")
        for name, cell in zip(names, row, strict=False):
            name, cell = _known(name.strip()), cell.strip()
            if not cell:
                continue
            if _is_list(name):
                cells[name] = (*cells.get(name, ()), *(part.strip() for part in cell.split("|") if part.strip()))
            else:
                cells[name] = cell
        if cells:
            yield where, _parsed(cells, where)


def _parsed(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return values by the names of settings, in their types."""
    return parse_values(TuneSettings, {_known(name): value for name, value in values.items()}, where)


def _known(name: Any) -> str:
    return ALIASES.get(str(name), str(name))


def _is_list(name: str) -> bool:
    field = TuneSettings.model_fields.get(name)
    return field is not None and get_origin(field.annotation) is tuple


def count(jobs: Sequence[BatchJob]) -> str:
    """Describe the number of jobs, clips and edits."""
    clips, edits = len({job.video for job in jobs}), sum(len(job.edits) * len(job.settings.seeds) for job in jobs)
    return f"{len(jobs)} job{'s' * (len(jobs) != 1)} of {clips} clip{'s' * (clips != 1)}, {edits} edits"
