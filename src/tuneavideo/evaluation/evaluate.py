"""Evaluates the edits of a run: opens what metrics need, measures, and keeps the scores in the run folder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tuneavideo import miniature
from tuneavideo import video as videos
from tuneavideo.bases import BASES
from tuneavideo.errors import DiskError, ModelError, RunError, SettingsError, TuneAVideoError
from tuneavideo.evaluation.metrics import check_metric
from tuneavideo.evaluation.metrics.background import Mask, read_mask
from tuneavideo.evaluation.metrics.drawn import around_subjects
from tuneavideo.evaluation.metrics.sample import NotMeasurable, Sample, Shown
from tuneavideo.evaluation.metrics.table import CLIP, METRICS, PICK, Need, Opened, opened
from tuneavideo.progress import Job, Progress
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import atomic, cache
from tuneavideo.storage.run_folder import RunFolder

FORMAT = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wish:
    """What to measure, and with what.

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
        """The metrics wished for. The miniature has its judge in place of CLIP, which other bases need."""
        drawn = _is_miniature(settings)
        needless = {"clip", "pick"} - {"clip" if self.clip else "", "pick" if self.pick else ""} if drawn else {"judge"}
        return [*self.metrics] or [name for name, metric in METRICS.items() if metric.need not in needless]


def evaluate(places: Sequence[Path | str], wish: Wish) -> Job:
    """Measure all edits of run folders, or single edit folders.

    Of every run, what was measured now comes as `Progress.scores`, in the form of `scores.json`; then the file is
    written, where scores measured before stay. A place or edit that cannot be measured is left out with a warning.

    Raises:
        RunError: No place has an edit that can be measured; the error is that of the first.
        SettingsError: A metric is not known.
        VideoError: The mask or the clips do not fit.
        DiskError: A `scores.json` cannot be written; the other runs are measured first.
    """
    if not places:
        raise SettingsError("nothing to measure; give one or more run folders or folders of edits")
    work, troubles = _by_run(places)
    bench, unwritten, number = _Bench(wish), list[DiskError](), 0
    total = sum(map(len, work.values()))
    for run, edits in work.items():
        scored, missing = list[dict[str, Any]](), list[Lack]()
        try:
            for edit in _each_scored(run, edits, bench, missing, troubles):
                scored.append(edit)
                number += 1
                yield Progress("evaluate", number, total, about=edit["folder"])
        except TuneAVideoError as error:
            troubles.append(error)
        if not scored:
            continue
        names = wish.names(run.read_settings())
        merged = _merged(run, names, scored, missing)
        asked = _part(merged, names, {edit["folder"] for edit in scored})
        yield Progress("evaluate", about=str(run.scores), scores=asked)
        try:
            atomic.write(run.scores, json.dumps(merged, indent=1))
            yield Progress("evaluate", path=run.scores)
        except DiskError as error:
            unwritten.append(error)
    if not number:
        raise troubles[0]
    for trouble in troubles:
        logger.warning("left out: %s", trouble)
    if unwritten:
        raise DiskError(f"{unwritten[0]}; the scores are shown but not kept (--json prints them for a file)")


Lack = tuple[str, str, str]
"""A metric, why it has no value, and the folder name of the edit."""


def _by_run(places: Sequence[Path | str]) -> tuple[dict[RunFolder, list[Path]], list[TuneAVideoError]]:
    """The edits to measure of every run, and why places have none; paths stay relative if they were given so."""
    work, troubles = dict[Path, tuple[RunFolder, list[Path]]](), list[TuneAVideoError]()
    for place in map(Path, places):
        single = (place / "edit.json").is_file()
        try:
            run = RunFolder.open(_up(place) if single else place)
            names = [os.path.basename(os.path.abspath(place))] if single else _whole_edits(run)
        except TuneAVideoError as error:
            troubles.append(error)
            continue
        run, edits = work.setdefault(run.path.resolve(), (run, []))
        edits += [edit for name in names if (edit := run.path / "edits" / name) not in edits]
    return dict(work.values()), troubles


def _up(edit: Path) -> Path:
    """The run folder of an edit's folder, relative to the current folder if the edit's is."""
    run = Path(os.path.abspath(edit)).parent.parent
    return run if edit.is_absolute() else Path(os.path.relpath(run))


def _whole_edits(run: RunFolder) -> list[str]:
    edits = [edit.name for edit in run.whole_edits()]
    if not edits:
        advice = (
            f"edit {run.quoted} --prompt ...' makes some" if run.is_tuned else f"tune --resume {run.quoted}' goes on"
        )
        state = "has no edits to measure" if run.is_tuned else "is not tuned to its end and has no edits to measure"
        raise RunError(f"{run.path} {state}; 'tuneavideo {advice}")
    return edits


def _each_scored(
    run: RunFolder, edits: Sequence[Path], bench: _Bench, missing: list[Lack], troubles: list[TuneAVideoError]
) -> Iterator[dict[str, Any]]:
    """The edits of a run with their scores; what cannot be compared with the source is among the troubles."""
    if not run.source.is_file():
        raise RunError(f"{run.source} is missing, and edits are compared with it; put it back")
    run.read_scores()  # before the work, for what is damaged
    settings, source = run.read_settings(), Shown(videos.read(run.source))
    mask = bench.mask(settings, source)
    for edit in edits:
        try:
            yield _scored(run, edit, source, bench, mask, missing)
        except TuneAVideoError as error:
            troubles.append(error)


def _scored(
    run: RunFolder, edit: Path, source: Shown, bench: _Bench, mask: Opened | str, missing: list[Lack]
) -> dict[str, Any]:
    """One edit with its scores, as `scores.json` has it; what has no value is None, or not there, and in `missing`."""
    about, settings = run.read_edit(edit), run.read_settings()
    sample = Sample(source, Shown(videos.read(run.read_clip(edit))), settings.prompt, about["prompt"])
    _check_same_shape(edit, sample)
    video, scores = sample.edit.video, dict[str, Any]()
    size = {"frames": video.frames, "width": video.width, "height": video.height}
    for name in bench.wish.names(settings):
        metric = METRICS[name]
        found = mask if metric.need == "mask" else bench.opened(metric.need, settings)
        if isinstance(found, str):
            missing.append((name, found, edit.name))
            continue
        try:
            value = metric.function(sample, found.model)
            scores[name] = {"value": value, "model": found.name, "revision": found.revision, **size}
        except NotMeasurable as why:
            scores[name] = None  # nor is what was measured before to be believed
            missing.append((name, str(why), edit.name))
    return {"folder": edit.name, "prompt": about["prompt"], "seed": about["seed"], "scores": scores}


def _check_same_shape(edit: Path, sample: Sample) -> None:
    shapes = [shown.video.frames_THWC.shape for shown in (sample.edit, sample.source)]
    if shapes[0] != shapes[1]:
        has, wants = (f"{t} frames of {width} x {height}" for t, height, width, _ in shapes)
        raise RunError(f"{edit}: found {has}; its source.mp4 has {wants}, and frames are compared one by one")


@dataclass
class _Bench:
    """What metrics need, opened when first needed; why not, where it cannot be."""

    wish: Wish
    known: dict[Need, Opened | str] = field(default_factory=dict)

    def opened(self, need: Need, settings: TuneSettings) -> Opened | str:
        if need == "judge" and not _is_miniature(settings):
            return "the judge knows the miniature's drawn world only"
        if need not in self.known:
            places = {"clip_place": self.wish.clip or CLIP, "pick_place": self.wish.pick or PICK}
            try:
                self.known[need] = opened(need, **places)
            except ModelError as error:
                self.known[need] = str(error)
        return self.known[need]

    def mask(self, settings: TuneSettings, source: Shown) -> Opened | str:
        """The mask given, or on the miniature one around what the judge takes for the subject."""
        if self.wish.mask:
            inside: np.ndarray = read_mask(self.wish.mask, source.video, settings.fit)
            return Opened(Mask(lambda _: inside), f"mask {self.wish.mask.name}", cache.key(inside))
        judge = self.opened("judge", settings)
        if isinstance(judge, str):
            return "needs a mask of what may change: --mask FILE or FOLDER"
        return judge._replace(model=Mask(lambda sample: around_subjects(sample, judge.model)))


def _merged(run: RunFolder, names: Sequence[str], scored: list[dict[str, Any]], missing: list[Lack]) -> dict[str, Any]:
    """These scores over those measured before of edits that are still the same."""
    before = _before(run)
    edits = {edit["folder"]: edit for edit in before["edits"]}
    old = [lack for lack in _lacks(before) if lack[0] not in names or lack[2] not in {e["folder"] for e in scored}]
    for edit in scored:
        had = edits.get(edit["folder"], {"scores": {}})["scores"]
        now = {name: score for name, score in {**had, **edit["scores"]}.items() if score}
        edits[edit["folder"]] = edit | {"scores": now}
    ordered = [edits[edit.name] for edit in run.whole_edits() if edit.name in edits]
    lacks = [(name, why, folder) for name, why, folder in old + missing if name not in edits[folder]["scores"]]
    return _told(ordered, lacks)


def _part(scores: dict[str, Any], names: Container[str], folders: Container[str]) -> dict[str, Any]:
    """Of scores in the form of the file, those of some metrics and edits."""
    edits = [edit for edit in scores["edits"] if edit["folder"] in folders]
    edits = [edit | {"scores": {k: v for k, v in edit["scores"].items() if k in names}} for edit in edits]
    return _told(edits, [lack for lack in _lacks(scores) if lack[0] in names and lack[2] in folders])


def _told(edits: list[dict[str, Any]], lacks: Sequence[Lack]) -> dict[str, Any]:
    """Scores in the form of the file: a reason names the edits it is true of, if it is not all."""
    every, reasons = [edit["folder"] for edit in edits], dict[tuple[str, str], set[str]]()
    for name, why, folder in lacks:
        reasons.setdefault((name, why), set()).add(folder)
    return {
        "format": FORMAT,
        "metrics": {name: _described(name) for name in METRICS if any(name in edit["scores"] for edit in edits)},
        "edits": edits,
        "missing": [
            {"metric": name, "why": why}
            | ({} if found == {*every} else {"edits": [folder for folder in every if folder in found]})
            for (name, why), found in reasons.items()
        ],
    }


def _lacks(scores: dict[str, Any]) -> list[Lack]:
    """What the file's `missing` says, edit by edit."""
    every = [edit["folder"] for edit in scores["edits"]]
    return [
        (each["metric"], each["why"], folder)
        for each in scores["missing"]
        for folder in each.get("edits", every)
        if folder in every
    ]


def _before(run: RunFolder) -> dict[str, Any]:
    """The scores that are there, without edits that are gone or were made since."""
    before = run.read_scores() or {"edits": [], "missing": []}
    now = {edit.name for edit in run.whole_edits() if before["edits"] and not run.is_newer(edit)}
    return before | {"edits": [edit for edit in before["edits"] if edit["folder"] in now]}


def _described(name: str) -> dict[str, Any]:
    metric = METRICS[name]
    baseline, source = metric.baseline or (None, None)
    told = {"unit": metric.unit, "better": metric.better, "about": metric.about}
    return told | {"baseline": baseline, "baseline_source": source}


def _is_miniature(settings: TuneSettings) -> bool:
    base = BASES.get(settings.base)
    return (base.source if base else settings.base) == str(miniature.MODEL)
