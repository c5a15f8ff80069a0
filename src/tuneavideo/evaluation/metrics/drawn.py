"""Edits of the miniature, by its judge: is what was asked for there, and what was not asked for unchanged?

What a prompt asks for are those of the judge's words that stand in it; a prompt that names no style asks for none.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tuneavideo.evaluation.metrics.judge import Judge, Reading
from tuneavideo.evaluation.metrics.sample import NotMeasurable, Sample

KINDS = ("subject", "background", "style")
SUBJECT_SIDE = 40
"""Side, in pixels at 64, of the square around a centre that may be the subject."""


def asked(prompt: str, judge: Judge) -> dict[str, str]:
    """What a prompt names, of each kind that it names."""
    found = {"style": "none"}
    for kind in KINDS:
        for word in judge.words[kind]:
            if re.search(rf"\b{re.escape(word)}\b", prompt.lower()):
                found[kind] = word
    return found


def seen(kind: str) -> Callable[[Sample, Judge], float]:
    """Share of the frames in which the judge sees what the prompt names of a kind, 0..1."""

    def share(sample: Sample, judge: Judge) -> float:
        wanted = asked(sample.prompt, judge)
        if kind not in wanted:
            raise NotMeasurable(f"the prompt names no {kind} that the judge knows")
        return _share(sample.edit.once(judge.read), {kind: wanted[kind]})

    return share


def success(sample: Sample, judge: Judge) -> float:
    """Share of the frames in which the judge sees all that the prompt names and the caption does not, 0..1."""
    before, after = asked(sample.caption, judge), asked(sample.prompt, judge)
    changed = {kind: word for kind, word in after.items() if before.get(kind) != word}
    if not changed:
        raise NotMeasurable("the prompt changes nothing that the judge knows")
    return _share(sample.edit.once(judge.read), changed)


def preserved(sample: Sample, judge: Judge) -> float:
    """Share of the frames in which all that the prompt does not change is as in most frames of the source, 0..1."""
    before, after = asked(sample.caption, judge), asked(sample.prompt, judge)
    source = sample.source.once(judge.read)
    kept = {kind: source.most(kind) for kind in KINDS if after.get(kind) in (before.get(kind), None)}
    if not kept:
        raise NotMeasurable("the prompt changes all that the judge knows")
    return _share(sample.edit.once(judge.read), kept)


def track_distance(sample: Sample, judge: Judge) -> float:
    """Mean distance of the subject's centre in the edit from that in the source, in pixels at 64."""
    return sample.edit.once(judge.read).track_distance(sample.source.once(judge.read).centres_TD)


def consistency(sample: Sample, judge: Judge) -> float:
    """Mean cosine of the judge's features of all pairs of frames, at most 1."""
    if sample.edit.video.frames < 2:
        raise NotMeasurable("one frame has no other to agree with")
    return sample.edit.once(judge.read).consistency()


def around_subjects(sample: Sample, judge: Judge) -> np.ndarray:
    """Squares around the subject's centres in source and edit, T H W, for a prompt that leaves alone what is beside."""
    before, after = asked(sample.caption, judge), asked(sample.prompt, judge)
    if any(after.get(kind, before.get(kind)) != before.get(kind) for kind in ("background", "style")):
        raise NotMeasurable("the prompt asks for another background or style")
    video = sample.source.video
    rows, columns = np.mgrid[: video.height, : video.width] + 0.5
    rows, columns = rows * judge.pixels / video.height, columns * judge.pixels / video.width
    inside = np.zeros(video.frames_THWC.shape[:3], bool)
    for shown in (sample.source, sample.edit):
        x, y = shown.once(judge.read).centres_TD.numpy().T[:, :, None, None]
        inside |= np.maximum(abs(columns - x), abs(rows - y)) <= SUBJECT_SIDE / 2
    return inside


def _share(reading: Reading, wanted: dict[str, str]) -> float:
    frames = zip(*(reading.seen[kind] for kind in wanted), strict=True)
    return float(np.mean([frame == tuple(wanted.values()) for frame in frames]))
