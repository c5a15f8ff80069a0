"""Evaluates the edits of a run: opens what metrics need, measures, and keeps the scores in the run folder."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tuneavideo import cache, files, miniature
from tuneavideo import video as videos
from tuneavideo.bases import BASES
from tuneavideo.errors import ModelError, RunError, SettingsError
from tuneavideo.metrics.background import Mask, read_mask
from tuneavideo.metrics.drawn import around_subjects
from tuneavideo.metrics.sample import NotMeasurable, Sample, Shown
from tuneavideo.metrics.table import CLIP, METRICS, PICK, Need, Opened, opened
from tuneavideo.progress import Job, Progress
from tuneavideo.runs import RunFolder
from tuneavideo.settings import TuneSettings

FORMAT = 1


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
            if name not in METRICS:
                near = difflib.get_close_matches(name, METRICS, n=1)
                raise SettingsError(
                    f"unknown metric {name!r}; "
                    + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(METRICS)}")
                )

    def names(self, settings: TuneSettings) -> list[str]:
        """The metrics wished for. The miniature has its judge in place of CLIP, which other bases need."""
        drawn = _is_miniature(settings)
        needless = {"clip", "pick"} - {"clip" if self.clip else "", "pick" if self.pick else ""} if drawn else {"judge"}
        return [*self.metrics] or [name for name, metric in METRICS.items() if metric.need not in needless]


def evaluate(places: Sequence[Path | str], wish: Wish) -> Job:
    """Measure all edits of run folders, or single edit folders; ends each run with its `scores.json`.

    Raises:
        RunError: A place is neither, or an edit has not the frames of its source.
        SettingsError: A metric is not known.
        VideoError: The mask does not fit.
    """
    work = _by_run(places)
    bench = _Bench(wish)
    total, number = sum(map(len, work.values())), 0
    for run, edits in work.items():
        settings = run.read_settings()
        source = Shown(videos.read(run.source))
        scored, missing = [], _Missing([edit.name for edit in edits])
        mask = bench.mask(settings, source)
        for edit in edits:
            scored.append(_scored(run, edit, source, bench, mask, missing))
            number += 1
            yield Progress("evaluate", number, total, about=edit.name)
        files.write(run.scores, json.dumps(_merged(run, bench.wish.names(settings), scored, missing), indent=1))
        yield Progress("evaluate", path=run.scores)


def _by_run(places: Sequence[Path | str]) -> dict[RunFolder, list[Path]]:
    """The edits to measure of every run."""
    work: dict[RunFolder, list[Path]] = {}
    for place in map(Path, places):
        single = (place / "edit.json").is_file()
        run = RunFolder(RunFolder.open(place.absolute().parent.parent if single else place).path.absolute())
        if not single and not run.whole_edits():
            raise RunError(f"{place} has no edits to measure; 'tuneavideo edit {place} --prompt ...' makes some")
        edits = work.setdefault(run, [])
        edits += [edit for edit in ([place.absolute()] if single else run.whole_edits()) if edit not in edits]
    return work


def _scored(
    run: RunFolder, edit: Path, source: Shown, bench: _Bench, mask: Opened | str, missing: _Missing
) -> dict[str, Any]:
    """One edit with its scores, as `scores.json` has it; what has no value is None, or not there, and in `missing`."""
    about, settings = run.read_edit(edit), run.read_settings()
    sample = Sample(source, Shown(videos.read(run.clip_of(edit))), settings.prompt, about["prompt"])
    _check_same_shape(edit, sample)
    video, scores = sample.edit.video, dict[str, Any]()
    size = {"frames": video.frames, "width": video.width, "height": video.height}
    for name in bench.wish.names(settings):
        metric = METRICS[name]
        found = mask if metric.need == "mask" else bench.opened(metric.need, settings)
        if isinstance(found, str):
            missing.add(name, found, edit.name)
            continue
        try:
            value = metric.function(sample, found.model)
            scores[name] = {"value": value, "model": found.name, "revision": found.revision, **size}
        except NotMeasurable as why:
            scores[name] = None  # nor is what was measured before to be believed
            missing.add(name, str(why), edit.name)
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


class _Missing:
    """What has no value, and why, said once for all edits that it is true of."""

    def __init__(self, edits: Sequence[str]) -> None:
        self.edits, self.found = list(edits), dict[tuple[str, str], list[str]]()

    def add(self, metric: str, why: str, edit: str) -> None:
        self.found.setdefault((metric, why), []).append(edit)

    def told(self) -> list[dict[str, str]]:
        """`metric` and `why`, naming the edits if it is not all."""
        return [
            {"metric": metric, "why": why if edits == self.edits else f"{', '.join(edits)}: {why}"}
            for (metric, why), edits in self.found.items()
        ]


def _merged(run: RunFolder, names: Sequence[str], scored: list[dict[str, Any]], missing: _Missing) -> dict[str, Any]:
    """These scores over those measured before of edits that are still the same."""
    edits = {edit["folder"]: edit for edit in _before(run)["edits"]}
    for edit in scored:
        old = edits.get(edit["folder"], {"scores": {}})["scores"]
        now = {name: score for name, score in {**old, **edit["scores"]}.items() if score}
        edits[edit["folder"]] = edit | {"scores": now}
    kept = [each for each in _before(run)["missing"] if each["metric"] not in names]
    measured = [edit["scores"].keys() for edit in edits.values()]
    return {
        "format": FORMAT,
        "metrics": {name: _described(name) for name in METRICS if any(name in scores for scores in measured)},
        "edits": [edits[folder] for folder in sorted(edits)],
        "missing": [each for each in kept + missing.told() if not all(each["metric"] in scores for scores in measured)],
    }


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
