"""Warp error: difference between an edit's motion and its source's."""

from __future__ import annotations

import numpy as np

from tuneavideo.evaluation.metrics.edit_pair import EditPair, NotMeasurable
from tuneavideo.evaluation.metrics.flow import Flow, consistent_pixels, warp


def warp_error(pair: EditPair, flow: Flow) -> float:
    """Compute the mean squared difference of an edit's frame and its next, warped back by the source's flow, x 1000.

    Pixels are 0..1 and squares are summed over the three colours. The mean is over the pixels that the source shows in
    both frames, then over pairs of frames. A frozen or blurred edit has a low error too. Source: Lai et al. 2018.
    """
    frames = pair.edit.video.frames_THWC.astype(np.float32) / 255
    forward, backward = pair.source.features(flow.flows)
    errors = []
    for t, (there, back) in enumerate(zip(forward, backward, strict=True)):
        visible = consistent_pixels(there, back)
        if visible.any():
            error = ((frames[t] - warp(frames[t + 1], there)) ** 2).sum(axis=2)
            errors.append(error[visible].mean())
    if not errors:
        raise NotMeasurable("no two frames of the source show the same")
    return float(np.mean(errors)) * 1000
