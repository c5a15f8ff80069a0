"""Temporal flicker: change over time where the source is static."""

from __future__ import annotations

import numpy as np

from tuneavideo.evaluation.metrics.edit_pair import EditPair, NotMeasurable

MAX_STATIC_CHANGE = 5
"""Grey levels by which a static pixel of the source may change: the noise of a codec."""
MIN_STATIC_FRACTION = 0.01
"""Fraction of pixels that must be static for a value."""


def flicker(pair: EditPair, _: object = None) -> float:
    """Compute the mean absolute change between frames of the edit where the source is static, in grey levels 0..255.

    VBench (Huang et al. 2024) takes the same difference over whole frames of static clips. Here the pixels are chosen
    by the source, so that intended motion does not count.
    """
    source, edit = (clip.video.frames_THWC.astype(np.int16) for clip in (pair.source, pair.edit))
    static = np.abs(np.diff(source, axis=0)).max(axis=3, initial=0) <= MAX_STATIC_CHANGE
    if not static.size or static.mean() < MIN_STATIC_FRACTION:
        raise NotMeasurable("hardly any pixel of the source is static")
    return float(np.abs(np.diff(edit, axis=0))[static].mean())
