"""Warp error: does the edit move as the source does?"""

from __future__ import annotations

import numpy as np

from tuneavideo.evaluation.metrics.flow import Flow, pulled, seen_again
from tuneavideo.evaluation.metrics.sample import NotMeasurable, Sample


def warp_error(sample: Sample, flow: Flow) -> float:
    """Mean squared difference of an edit's frame and its next one carried back along the source's motion, x 1000.

    Pixels in 0..1, squares summed over the three colours; a mean over the pixels that the source shows in both frames
    (`seen_again`), then over pairs of frames. Source: Lai et al. 2018. A frozen or blurred edit has little of it too.
    """
    frames = sample.edit.video.frames_THWC.astype(np.float32) / 255
    forward, backward = sample.source.once(flow.flows)
    errors = []
    for t, (there, back) in enumerate(zip(forward, backward, strict=True)):
        seen = seen_again(there, back)
        if seen.any():
            error = ((frames[t] - pulled(frames[t + 1], there)) ** 2).sum(axis=2)
            errors.append(error[seen].mean())
    if not errors:
        raise NotMeasurable("no two frames of the source show the same")
    return float(np.mean(errors)) * 1000
