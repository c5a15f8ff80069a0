"""What a run folder holds, as far as it can be read; what is damaged or missing is said in notes."""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from tuneavideo import video as videos
from tuneavideo.config import checked, layers
from tuneavideo.errors import TuneAVideoError
from tuneavideo.progress import Step
from tuneavideo.reporting.formatting import duration, plain
from tuneavideo.settings import Sampling, TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import Video

Thing = TypeVar("Thing")


class Score(BaseModel):
    """A metric of an edit, and what it was measured with."""

    value: float | None
    model: str | None = None
    revision: str | None = None
    frames: int | None = None
    width: int | None = None
    height: int | None = None


class Metric(BaseModel):
    """What a score means."""

    unit: str = ""
    better: Literal["higher", "lower"]
    about: str = ""
    baseline: float | None = None
    baseline_source: str | None = None


class Scored(BaseModel):
    """The scores of one edit, by metric."""

    folder: str
    scores: dict[str, Score]


class Missing(BaseModel):
    """A metric that could not be computed."""

    metric: str
    why: str
    edits: list[str] = []
    """Folder names of the edits it is true of; empty if of all."""

    @property
    def what(self) -> str:
        """The metric, and the numbers of the edits."""
        numbers = ", ".join(folder.split("-")[0] for folder in self.edits)
        return self.metric.replace("_", " ") + (f" (edits {numbers})" if numbers else "")


class Scores(BaseModel):
    """The file `scores.json` of a run."""

    format: Literal[1]
    metrics: dict[str, Metric]
    edits: list[Scored]
    missing: list[Missing] = []

    def of(self, folder: str, metric: str) -> Score | None:
        return next((edit.scores.get(metric) for edit in self.edits if edit.folder == folder), None)


class Note(NamedTuple):
    """Something a reader should know of a run, and the command that changes it."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Clip:
    """A clip of the page: an mp4 as a data URI; empty where `trouble` says why there is none."""

    uri: str = ""
    frames: int = 0
    fps: float = 0
    width: int = 1
    height: int = 1
    trouble: str = ""


class Made(BaseModel, extra="allow"):
    """The file `edit.json` of an edit; its other settings are extra."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Edit:
    """An edit of a run; `changed` are its settings that are not the run's own."""

    folder: str
    prompt: str
    seed: int
    changed: dict[str, Any]
    clip: Clip

    @property
    def number(self) -> str:
        """The number of its folder."""
        return self.folder.split("-")[0]

    @property
    def about(self) -> str:
        """Its seed and what was set for it alone, in words."""
        seed = [f"seed {self.seed}"] if self.seed else []
        return ", ".join(seed + [f"{name.replace('_', ' ')} {plain(value)}" for name, value in self.changed.items()])


@dataclass
class Run:
    """What a run folder holds, as far as it can be read."""

    name: str
    path: Path
    settings: TuneSettings | None = None
    preset: dict[str, Any] = field(default_factory=dict)
    source: Clip = Clip()
    edits: list[Edit] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    scores: Scores | None = None
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    @property
    def caption(self) -> str:
        return self.settings.prompt if self.settings else self.name

    @property
    def not_measured(self) -> list[str]:
        """What has no score, by reason."""
        found: dict[str, list[str]] = {}
        for each in self.scores.missing if self.scores else ():
            found.setdefault(each.why, []).append(each.what)
        return [f"{', '.join(names)}: {why}" for why, names in found.items()]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What the run is, in a few names and words."""
        facts = []
        if self.settings:
            facts += [("base", plain(self.settings.base)), ("preset", self.settings.preset)]
        if clip := self.source if self.source.uri else None:
            facts.append(("clip", f"{clip.frames} frames of {clip.width} × {clip.height}, {clip.fps:.3g} a second"))
        if self.steps:
            seconds, memory = sum(step.seconds for step in self.steps), max(step.memory for step in self.steps)
            facts.append(("tuned", f"{self.steps[-1].number} steps in {duration(seconds)}"))
            facts.append(("memory in tuning", f"at most {atomic.size(memory)}"))
        return facts


def opened(folder: RunFolder, name: str) -> Run:
    """Read a run folder; what cannot be read is left out, with a note."""
    run = Run(name, folder.path)
    run.settings = _tried(run, folder.read_settings)
    if run.settings:
        standard = layers({"base": run.settings.base, "preset": run.settings.preset, "video": "-", "prompt": "-"}, {})
        run.preset = checked(TuneSettings, standard).model_dump()
    run.versions = _tried(run, folder.written_with) or {}
    run.steps = _steps(_tried(run, folder.steps) or [])
    source = _tried(run, lambda: videos.read(folder.source)) if folder.source.is_file() else None
    run.source = _clip(source) if source else Clip(trouble=f"{folder.source.name} is missing or damaged")
    for path in folder.edits():
        _add_edit(run, path, source)
    _add_notes(run, folder)
    return run


def _add_edit(run: Run, folder: Path, source: Video | None) -> None:
    if not (folder / "edit.json").is_file():
        run.notes.append(Note(f"edits/{folder.name} has no edit.json and is left out."))
        return
    made = _tried(
        run, lambda: Made.model_validate_json((folder / "edit.json").read_bytes()), f"{folder.name}/edit.json"
    )
    if not made:
        return
    own = run.settings.model_dump(mode="json", include=set(Sampling.model_fields)) if run.settings else {}
    changed = {key: value for key, value in (made.model_extra or {}).items() if own.get(key, value) != value}
    run.edits.append(Edit(folder.name, made.prompt, made.seed, changed, _edit_clip(run, folder, source)))


def _edit_clip(run: Run, folder: Path, source: Video | None) -> Clip:
    """An edit's video in the form it was kept in, in time with its source however fast it plays."""
    kept = [path for name in ("edit.mp4", "edit.gif", "frames") if (path := folder / name).exists()]
    video = _tried(run, lambda: videos.read(kept[0])) if kept else None
    if not video:
        return Clip(trouble=f"{kept[0].name} is damaged" if kept else "its video is missing")
    return _clip(replace(video, fps=source.fps) if source and source.frames == video.frames else video)


def _clip(video: Video) -> Clip:
    encoded = base64.b64encode(videos.for_page(video)).decode()
    uri = f"data:video/mp4;base64,{encoded}"
    return Clip(uri, video.frames, video.fps, video.width, video.height)


def _steps(lines: Iterable[Any]) -> list[Step]:
    """Logged steps, without lines that are none."""
    kind, steps = TypeAdapter(Step), []
    for line in lines:
        try:
            steps.append(kind.validate_python(line))
        except ValidationError:
            continue
    return [step for step in steps if math.isfinite(step.loss)]


def _add_notes(run: Run, folder: RunFolder) -> None:
    where = shlex.quote(str(folder.path))
    if not folder.is_tuned:
        total = f" of {run.settings.max_train_steps}" if run.settings else ""
        done = f"Tuning is not finished: step {run.steps[-1].number if run.steps else 0}{total}."
        run.notes.append(Note(f"{done} Go on with", f"tuneavideo tune --resume {where}"))
    elif not run.edits:
        run.notes.append(Note("There are no edits yet. Make one with", f'tuneavideo edit {where} --prompt "…"'))
    if folder.scores.is_file():
        run.scores = _tried(run, lambda: Scores.model_validate_json(folder.scores.read_bytes()), folder.scores.name)
    elif run.edits:
        run.notes.append(Note("The edits are not measured yet. Measure them with", f"tuneavideo evaluate {where}"))


def _tried(run: Run, read: Callable[[], Thing], name: str = "") -> Thing | None:
    """What a file holds; None with a note in the run if it cannot be read."""
    try:
        return read()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        run.notes.append(Note(f"{name} cannot be read: {where} {first['msg'][0].lower()}{first['msg'][1:]}."))
    except (TuneAVideoError, OSError, ValueError) as error:
        run.notes.append(Note(f"{name} {error}".strip()))
    return None
