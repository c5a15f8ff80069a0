"""Temporal flicker: what stands still in the source should stand still in the edit."""

from __future__ import annotations

import numpy as np

from tuneavideo.evaluation.metrics.sample import NotMeasurable, Sample

STILL = 5
"""Grey levels by which a pixel of the source may change and still count as standing still: the noise of a codec."""
ENOUGH = 0.01
"""Share of pixels that must stand still for a value."""


def flicker(sample: Sample, _: object = None) -> float:
    """Mean absolute change from a frame of the edit to the next where the source stands still, in grey levels 0..255.

    VBench (Huang et al. 2024) takes the same difference over whole frames, and only of clips that stand still; here
    the pixels are chosen by the source, so that what should move does not count.
    """
    source, edit = (shown.video.frames_THWC.astype(np.int16) for shown in (sample.source, sample.edit))
    still = np.abs(np.diff(source, axis=0)).max(axis=3, initial=0) <= STILL
    if not still.size or still.mean() < ENOUGH:
        raise NotMeasurable("hardly anything stands still in the source")
    return float(np.abs(np.diff(edit, axis=0))[still].mean())
