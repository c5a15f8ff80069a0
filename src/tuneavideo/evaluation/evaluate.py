"""Evaluation of the edits of runs: loads the models of metrics, scores edits and writes `scores.json`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuneavideo import miniature
from tuneavideo import video as videos
from tuneavideo.bases import BASES
from tuneavideo.errors import DiskError, ModelError, RunError, SettingsError, TuneAVideoError, VideoError
from tuneavideo.evaluation.metrics import check_metric
from tuneavideo.evaluation.metrics.edit_pair import CachedVideo, EditPair, NotMeasurable
from tuneavideo.evaluation.metrics.judge_metrics import subject_mask
from tuneavideo.evaluation.metrics.table import CLIP, METRICS, PICK, LoadedModel, Requirement, load_model
from tuneavideo.evaluation.score_file import Missing, merge, select
from tuneavideo.progress import Events, Progress
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import atomic, cache
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video.masks import read_mask

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationSettings:
    """The metrics to compute, and their models.

    Attributes:
        metrics: Names of the table; by default all that suit the base.
        mask: File or folder, bright where edits may change the picture.
        clip: Hub id or folder of CLIP; by default that of LOVEU-TGVE-2023.
        pick: Hub id or folder of PickScore.
    """

    metrics: Sequence[str] = ()
    mask: Path | None = None
    clip: str | None = None
    pick: str | None = None

    def __post_init__(self) -> None:
        for name in self.metrics:
            check_metric(name)

    def names(self, settings: TuneSettings) -> list[str]:
        """Return the metrics to compute for a run. By default the miniature has its judge in place of CLIP."""
        if self.metrics:
            return [*self.metrics]
        unsuitable = {"judge"}
        if _is_miniature(settings):
            unsuitable = {name for name, source in (("clip", self.clip), ("pick", self.pick)) if not source}
        return [name for name, metric in METRICS.items() if metric.requires not in unsuitable]


def evaluate(places: Sequence[Path | str], settings: EvaluationSettings) -> Events:
    """Score all edits of run folders, or single edit folders.

    `scores.json` is written after every edit, so that a stopped evaluation keeps its scores; earlier scores of other
    metrics stay. The new ones of a run are yielded as `Progress.scores`, in the form of the file. A run or edit that
    cannot be scored is left out with a warning.

    Raises:
        RunError: No place has an edit that can be scored; the error is that of the first.
        SettingsError: A metric is not known.
        VideoError: The mask or the clips do not fit.
        DiskError: A `scores.json` cannot be written; the other runs are scored first.
    """
    if not places:
        raise SettingsError("nothing to measure; give one or more run folders or folders of edits")
    edits_by_run, errors = _edits_by_run(places)
    models, unwritten, number = _Models(settings), list[DiskError](), 0
    total = sum(map(len, edits_by_run.values()))
    for run, edits in edits_by_run.items():
        scored, missing, scores, not_written = list[dict[str, Any]](), list[Missing](), dict[str, Any](), None
        names = list[str]()
        try:
            names = settings.names(run.read_settings())
            for edit in _score_run(run, edits, models, missing, errors):
                scored.append(edit)
                number += 1
                scores = merge(run, names, scored, missing)
                not_written = _write(run, scores)
                yield Progress("evaluate", number, total, about=edit["folder"])
        except TuneAVideoError as error:
            errors.append(error)
        if not scored:
            continue
        new = select(scores, names, {edit["folder"] for edit in scored})
        yield Progress("evaluate", about=str(run.scores), scores=new)
        if not_written:
            unwritten.append(not_written)
        else:
            yield Progress("evaluate", path=run.scores)
    if not number:
        raise errors[0]
    for error in errors:
        logger.warning("left out: %s", error)
    if unwritten:
        raise DiskError(f"{unwritten[0]}; the scores are shown but not kept (--json prints them for a file)")


def _write(run: RunFolder, scores: dict[str, Any]) -> DiskError | None:
    try:
        atomic.write(run.scores, json.dumps(scores, indent=1))
    except DiskError as error:
        return error


def _edits_by_run(places: Sequence[Path | str]) -> tuple[dict[RunFolder, list[Path]], list[TuneAVideoError]]:
    """Find the edits to score of every run, and the errors of places that have none. Relative paths stay relative."""
    found, errors = dict[Path, tuple[RunFolder, list[Path]]](), list[TuneAVideoError]()
    for place in map(Path, places):
        single = (place / "edit.json").is_file()
        try:
            run = RunFolder.open(_run_of(place) if single else place)
            names = [os.path.basename(os.path.abspath(place))] if single else _finished_edits(run)
        except TuneAVideoError as error:
            errors.append(error)
            continue
        run, edits = found.setdefault(run.path.resolve(), (run, []))
        edits += [edit for name in names if (edit := run.path / "edits" / name) not in edits]
    return dict(found.values()), errors


def _run_of(edit: Path) -> Path:
    run = Path(os.path.abspath(edit)).parent.parent
    return run if edit.is_absolute() else Path(os.path.relpath(run))


def _finished_edits(run: RunFolder) -> list[str]:
    edits = [edit.name for edit in run.whole_edits()]
    if not edits and run.is_tuned:
        raise RunError(f"{run.path} has no edits to measure; 'tuneavideo edit {run.quoted} --prompt ...' makes some")
    if not edits:
        raise RunError(
            f"{run.path} is not tuned to its end and has no edits to measure; "
            f"'tuneavideo tune --resume {run.quoted}' goes on"
        )
    return edits


def _score_run(
    run: RunFolder, edits: Sequence[Path], models: _Models, missing: list[Missing], errors: list[TuneAVideoError]
) -> Iterator[dict[str, Any]]:
    """Yield each edit with its scores, and append to `errors` for edits that do not fit the source."""
    run.read_scores()  # raises for a damaged file before the work
    source = _read_source(run)
    mask = models.mask(run.read_settings(), source)
    for edit in edits:
        try:
            yield _score(run, edit, source, models, mask, missing)
        except TuneAVideoError as error:
            errors.append(error)


def _read_source(run: RunFolder) -> CachedVideo | str:
    """Read the source clip; return the reason if it cannot be read, for the metrics that use it."""
    if not run.source.is_file():
        return f"needs the source clip, and {run.source} is missing; put it back"
    try:
        return CachedVideo(videos.read(run.source))
    except VideoError as error:
        return f"needs the source clip: {error}"


def _score(
    run: RunFolder,
    edit: Path,
    source: CachedVideo | str,
    models: _Models,
    mask: LoadedModel | str,
    missing: list[Missing],
) -> dict[str, Any]:
    """Return one edit as in `scores.json`. A metric without a value is None or absent, and appended to `missing`."""
    record, settings = run.read_edit(edit), run.read_settings()
    pair = EditPair(source, CachedVideo(videos.read(run.read_clip(edit))), settings.prompt, record["prompt"])
    _check_same_shape(edit, pair)
    video, scores = pair.edit.video, dict[str, Any]()
    size = {"frames": video.frames, "width": video.width, "height": video.height}
    for name in models.settings.names(settings):
        metric = METRICS[name]
        model = mask if metric.requires == "mask" else models.load(metric.requires, settings)
        if isinstance(model, str):
            missing.append(Missing(name, model, edit.name))
            continue
        try:
            value = metric.function(pair, model.model)
            scores[name] = {"value": value, "model": model.name, "revision": model.revision, **size}
        except NotMeasurable as reason:
            scores[name] = None  # replaces an earlier score
            missing.append(Missing(name, str(reason), edit.name))
    return {"folder": edit.name, "prompt": record["prompt"], "seed": record["seed"], "scores": scores}


def _check_same_shape(edit: Path, pair: EditPair) -> None:
    if isinstance(pair.original, str):
        return
    shapes = [clip.video.frames_THWC.shape for clip in (pair.edit, pair.original)]
    if shapes[0] != shapes[1]:
        has, expected = (f"{t} frames of {width} x {height}" for t, height, width, _ in shapes)
        raise RunError(f"{edit}: found {has}; its source.mp4 has {expected}, and frames are compared one by one")


@dataclass
class _Models:
    """The models of metrics, loaded when first needed; for one that cannot be, the reason."""

    settings: EvaluationSettings
    loaded: dict[Requirement, LoadedModel | str] = field(default_factory=dict)

    def load(self, requirement: Requirement, run_settings: TuneSettings) -> LoadedModel | str:
        if requirement == "judge" and not _is_miniature(run_settings):
            return "the judge knows the miniature's drawn world only"
        if requirement not in self.loaded:
            clip, pick = self.settings.clip or CLIP, self.settings.pick or PICK
            try:
                self.loaded[requirement] = load_model(requirement, clip_source=clip, pick_source=pick)
            except ModelError as error:
                self.loaded[requirement] = str(error)
        return self.loaded[requirement]

    def mask(self, run_settings: TuneSettings, source: CachedVideo | str) -> LoadedModel | str:
        """Return the mask of the settings, or on the miniature squares around the subjects that the judge finds."""
        if isinstance(source, str):
            return source
        if self.settings.mask:
            inside = read_mask(self.settings.mask, source.video, run_settings.fit)
            return LoadedModel(lambda _: inside, f"mask {self.settings.mask.name}", cache.key(inside))
        judge = self.load("judge", run_settings)
        if isinstance(judge, str):
            return "needs a mask of what may change: --mask FILE or FOLDER"
        return judge._replace(model=lambda pair: subject_mask(pair, judge.model))


def _is_miniature(settings: TuneSettings) -> bool:
    base = BASES.get(settings.base)
    return (base.source if base else settings.base) == str(miniature.MODEL)
