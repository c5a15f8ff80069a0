"""Metrics of edits on the miniature, by its judge. A prompt requests the words of the judge's vocabulary in it."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from torch import Tensor

from tuneavideo.evaluation.metrics.edit_pair import EditPair, NotMeasurable
from tuneavideo.evaluation.metrics.judge import Judge, Reading
from tuneavideo.video import Video

ATTRIBUTES = ("subject", "background", "style")
SUBJECT_SIDE = 40
"""Side of the square around a subject's centre that is not background, in pixels of a 64-pixel frame."""


def requested(prompt: str, judge: Judge) -> dict[str, str]:
    """Return the word that a prompt names for each attribute; a prompt without a style requests `none`."""
    words = {"style": "none"}
    for attribute in ATTRIBUTES:
        for word in judge.words[attribute]:
            if re.search(rf"\b{re.escape(word)}\b", prompt.lower()):
                words[attribute] = word
    return words


def attribute_seen(attribute: str) -> Callable[[EditPair, Judge], float]:
    """Return a metric: the fraction of the frames that show the prompt's word for an attribute, 0..1."""

    def fraction(pair: EditPair, judge: Judge) -> float:
        words = requested(pair.prompt, judge)
        if attribute not in words:
            raise NotMeasurable(f"the prompt names no {attribute} that the judge knows")
        return _fraction(pair.edit.features(judge.read), {attribute: words[attribute]})

    return fraction


def success(pair: EditPair, judge: Judge) -> float:
    """Compute the fraction of the frames that show all that the prompt names and the caption does not, 0..1."""
    before, after = requested(pair.caption, judge), requested(pair.prompt, judge)
    changed = {attribute: word for attribute, word in after.items() if before.get(attribute) != word}
    if not changed:
        raise NotMeasurable("the prompt changes nothing that the judge knows")
    return _fraction(pair.edit.features(judge.read), changed)


def preserved(pair: EditPair, judge: Judge) -> float:
    """Compute the fraction of the frames in which unedited attributes are as in most frames of the source, 0..1."""
    before, after = requested(pair.caption, judge), requested(pair.prompt, judge)
    source = pair.source.features(judge.read)
    kept = {name: source.most(name) for name in ATTRIBUTES if after.get(name) in (before.get(name), None)}
    if not kept:
        raise NotMeasurable("the prompt changes all that the judge knows")
    return _fraction(pair.edit.features(judge.read), kept)


def track_distance(pair: EditPair, judge: Judge) -> float:
    """Compute the mean distance of the subject's centres in edit and source, in pixels of a 64-pixel frame."""
    return pair.edit.features(judge.read).track_distance(pair.source.features(judge.read).centres_TD)


def consistency(pair: EditPair, judge: Judge) -> float:
    """Compute the mean cosine similarity of the judge's features over all pairs of frames, at most 1."""
    if pair.edit.video.frames < 2:
        raise NotMeasurable("one frame has no other to agree with")
    return pair.edit.features(judge.read).consistency()


def subject_mask(pair: EditPair, judge: Judge) -> np.ndarray:
    """Return `subject_squares` of source and edit, for a prompt that keeps background and style."""
    before, after = requested(pair.caption, judge), requested(pair.prompt, judge)
    if any(after.get(name, before.get(name)) != before.get(name) for name in ("background", "style")):
        raise NotMeasurable("the prompt requests another background or style")
    centres = [clip.features(judge.read).centres_TD for clip in (pair.source, pair.edit)]
    return subject_squares(pair.source.video, *centres, pixels=judge.pixels)


def subject_squares(video: Video, *centres_TD: Tensor, pixels: int = 64) -> np.ndarray:
    """Return a mask of squares around subjects.

    Args:
        video: The clip, for its size.
        *centres_TD: Centres in every frame, x and y, in pixels of a frame whose side is `pixels`.
        pixels: This side.

    Returns:
        True in a square of side `SUBJECT_SIDE` around any of the centres, T H W.
    """
    rows, columns = np.mgrid[: video.height, : video.width] + 0.5
    rows, columns = rows * pixels / video.height, columns * pixels / video.width
    inside = np.zeros(video.frames_THWC.shape[:3], bool)
    for centres in centres_TD:
        x, y = centres.numpy().T[:, :, None, None]
        inside |= np.maximum(abs(columns - x), abs(rows - y)) <= SUBJECT_SIDE / 2
    return inside


def _fraction(reading: Reading, words: dict[str, str]) -> float:
    frames = zip(*(reading.seen[attribute] for attribute in words), strict=True)
    return float(np.mean([frame == tuple(words.values()) for frame in frames]))
