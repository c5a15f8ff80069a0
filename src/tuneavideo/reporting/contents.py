"""Contents of a run folder for the report; damaged and missing files become notes."""

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

Contents = TypeVar("Contents")


class Score(BaseModel):
    """The value of a metric for an edit, with model, number of frames and their size in pixels."""

    value: float | None
    model: str | None = None
    revision: str | None = None
    frames: int | None = None
    width: int | None = None
    height: int | None = None


class Metric(BaseModel):
    """The unit, direction and published baseline of a metric."""

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
    """A metric without a value."""

    metric: str
    why: str
    edits: list[str] = []
    """Folder names of the edits without a value; empty for all."""

    @property
    def label(self) -> str:
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
        """Return the score of an edit; None if it was not measured."""
        return next((edit.scores.get(metric) for edit in self.edits if edit.folder == folder), None)


class Note(NamedTuple):
    """A remark on a run, and the command that helps."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Clip:
    """A video of the page.

    Attributes:
        uri: The mp4 file as a data URI; empty if there is none.
        frames: Number of frames.
        fps: Frames a second.
        width: Width in pixels.
        height: Height in pixels.
        problem: The reason why there is no video.
    """

    uri: str = ""
    frames: int = 0
    fps: float = 0
    width: int = 1
    height: int = 1
    problem: str = ""


class EditRecord(BaseModel, extra="allow"):
    """The file `edit.json` of an edit; its settings are extra fields."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Edit:
    """An edit of a run; `changed` are the settings that differ from the run's."""

    folder: str
    prompt: str
    seed: int
    changed: dict[str, Any]
    clip: Clip
    is_tuned: bool = True

    @property
    def number(self) -> str:
        """The number of its folder."""
        return self.folder.split("-")[0]

    @property
    def about(self) -> str:
        """Whether it is untuned, its seed, unless 0, and its changed settings."""
        seed = ["without tuning"] * (not self.is_tuned) + ([f"seed {self.seed}"] if self.seed else [])
        return ", ".join(seed + [f"{name.replace('_', ' ')} {plain(value)}" for name, value in self.changed.items()])


@dataclass
class Run:
    """The readable contents of a run folder."""

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
    is_untuned: bool = False

    @property
    def caption(self) -> str:
        """The prompt of the source; without settings the run's name."""
        return self.settings.prompt if self.settings else self.name

    @property
    def not_measured(self) -> list[str]:
        """Metrics without a value, grouped by reason."""
        found: dict[str, list[str]] = {}
        for each in self.scores.missing if self.scores else ():
            found.setdefault(each.why, []).append(each.label)
        return [f"{', '.join(names)}: {why}" for why, names in found.items()]

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Names and values of the summary."""
        facts = []
        if self.settings:
            facts += [("base", plain(self.settings.base)), ("preset", self.settings.preset)]
        if clip := self.source if self.source.uri else None:
            facts.append(("clip", f"{clip.frames} frames of {clip.width} × {clip.height}, {clip.fps:.3g} a second"))
        if self.steps:
            seconds, memory = sum(step.seconds for step in self.steps), max(step.memory for step in self.steps)
            facts.append(("tuned", f"{self.steps[-1].number} steps in {duration(seconds)}"))
            facts.append(("memory in tuning", f"at most {atomic.size(memory)}"))
        elif self.is_untuned:
            facts.append(("tuned", "no"))
        return facts


def read_run(folder: RunFolder, name: str) -> Run:
    """Read a run folder; files that cannot be read are left out with a note."""
    run = Run(name, folder.path, is_untuned=folder.is_untuned)
    run.settings = _try_read(run, folder.read_settings)
    if run.settings:
        standard = layers({"base": run.settings.base, "preset": run.settings.preset, "video": "-", "prompt": "-"}, {})
        run.preset = checked(TuneSettings, standard).model_dump()
    run.versions = _try_read(run, folder.written_with) or {}
    run.steps = _steps(_try_read(run, folder.steps) or [])
    source = _try_read(run, lambda: videos.read(folder.source)) if folder.source.is_file() else None
    run.source = _clip(source) if source else Clip(problem=f"{folder.source.name} is missing or damaged")
    for path in folder.edits():
        _add_edit(run, path, source)
    _add_notes(run, folder)
    return run


def _add_edit(run: Run, folder: Path, source: Video | None) -> None:
    if not (folder / "edit.json").is_file():
        run.notes.append(Note(f"edits/{folder.name} has no edit.json and is left out."))
        return
    record = _try_read(
        run, lambda: EditRecord.model_validate_json((folder / "edit.json").read_bytes()), f"{folder.name}/edit.json"
    )
    if not record:
        return
    own = run.settings.model_dump(mode="json", include=set(Sampling.model_fields)) if run.settings else {}
    changed = {key: value for key, value in (record.model_extra or {}).items() if own.get(key, value) != value}
    clip, is_tuned = _edit_clip(run, folder, source), (record.model_extra or {}).get("tuned_steps") != 0
    run.edits.append(Edit(folder.name, record.prompt, record.seed, changed, clip, is_tuned))


def _edit_clip(run: Run, folder: Path, source: Video | None) -> Clip:
    """Read an edit's video, at the frame rate of its source so that both play in step."""
    kept = [path for name in ("edit.mp4", "edit.gif", "frames") if (path := folder / name).exists()]
    video = _try_read(run, lambda: videos.read(kept[0])) if kept else None
    if not video:
        return Clip(problem=f"{kept[0].name} is damaged" if kept else "its video is missing")
    return _clip(replace(video, fps=source.fps) if source and source.frames == video.frames else video)


def _clip(video: Video) -> Clip:
    encoded = base64.b64encode(videos.encode_for_page(video)).decode()
    uri = f"data:video/mp4;base64,{encoded}"
    return Clip(uri, video.frames, video.fps, video.width, video.height)


def _steps(lines: Iterable[Any]) -> list[Step]:
    """Parse logged steps; invalid lines are left out."""
    kind, steps = TypeAdapter(Step), []
    for line in lines:
        try:
            steps.append(kind.validate_python(line))
        except ValidationError:
            continue
    return [step for step in steps if math.isfinite(step.loss)]


def _add_notes(run: Run, folder: RunFolder) -> None:
    where = shlex.quote(str(folder.path))
    command = f"tuneavideo tune --resume {where}"
    if folder.last_error:
        run.notes.append(Note(f"The last job failed: {folder.last_error}. Its traceback is in {folder.error.name}."))
    if folder.is_untuned:
        run.notes.append(Note("The clip is not tuned. Tune it, and make the edits again, with", command))
    elif not folder.is_tuned:
        total = f" of {run.settings.max_train_steps}" if run.settings else ""
        done = f"Tuning is not finished: step {run.steps[-1].number if run.steps else 0}{total}."
        run.notes.append(Note(f"{done} Go on with", command))
    elif not run.edits:
        run.notes.append(Note("There are no edits yet. Make one with", f'tuneavideo edit {where} --prompt "…"'))
    if folder.scores.is_file():
        run.scores = _try_read(run, lambda: Scores.model_validate_json(folder.scores.read_bytes()), folder.scores.name)
    elif run.edits:
        run.notes.append(Note("The edits are not measured yet. Measure them with", f"tuneavideo evaluate {where}"))


def _try_read(run: Run, read: Callable[[], Contents], name: str = "") -> Contents | None:
    """Return the contents of a file; None with a note in the run if it cannot be read."""
    try:
        return read()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        run.notes.append(Note(f"{name} cannot be read: {where} {first['msg'][0].lower()}{first['msg'][1:]}."))
    except (TuneAVideoError, OSError, ValueError) as error:
        run.notes.append(Note(f"{name} {error}".strip()))
    return None
