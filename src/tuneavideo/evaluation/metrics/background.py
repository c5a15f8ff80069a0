"""How well an edit leaves alone what it should: PSNR and SSIM outside a mask. Pixels are 0..255."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_erosion
from skimage.metrics import structural_similarity

from tuneavideo import video as videos
from tuneavideo.errors import VideoError
from tuneavideo.evaluation.metrics.sample import NotMeasurable, Sample
from tuneavideo.video import Fit, Video

LEAST = 1e-10
"""Squared error below which frames count as equal: 148 dB."""
REACH = 5
"""Pixels that a window of SSIM (11 x 11) reaches to each side."""


@dataclass(frozen=True)
class Mask:
    """Where an edit may change the picture: `inside(sample)` is true there, T H W or 1 H W."""

    inside: Callable[[Sample], np.ndarray]


def read_mask(path: Path, video: Video, fit: Fit) -> np.ndarray:
    """A picture, or a clip or folder of as many as the video has frames; bright is inside, T H W or 1 H W.

    It is brought to the video's size as the clip was (`fit`).

    Raises:
        VideoError: It cannot be read, has other than one or the video's number of frames, or leaves no background.
    """
    pictures = videos.read(path, size=(video.width, video.height), fit=fit)
    if pictures.frames not in (1, video.frames):
        raise VideoError(f"{path}: expected 1 frame or {video.frames}, as the clip has; found {pictures.frames}")
    inside = pictures.frames_THWC.mean(axis=3) >= 128
    if inside.all():
        raise VideoError(f"{path}: all of it is bright, so nothing is background; make dark what should stay")
    return inside


def psnr(sample: Sample, mask: Mask) -> float:
    """Peak signal-to-noise ratio in dB of all pixels outside the mask, over all frames at once; equal is 148.

    Only these pixels are counted. (Others multiply both pictures by the mask and count its inside as perfect.)
    """
    outside = ~_whole(sample, mask)
    if not outside.any():
        raise NotMeasurable("nothing is outside the mask")
    source, edit = sample.source.video.frames_THWC, sample.edit.video.frames_THWC
    error = np.mean((source[outside].astype(np.float64) - edit[outside]) ** 2)
    return float(10 * np.log10(255**2 / max(error, LEAST)))


def ssim(sample: Sample, mask: Mask) -> float:
    """Structural similarity (Wang et al. 2004: Gaussian windows, sigma 1.5), at most 1, by scikit-image.

    Mean over the pixels whose whole window lies outside the mask, so that an edit is not seen from beside it.
    """
    source, edit = sample.source.video, sample.edit.video
    if min(source.width, source.height) <= 2 * REACH:
        raise NotMeasurable(f"frames of {source.width} x {source.height} are smaller than a window of SSIM")
    square = np.ones((1, 2 * REACH + 1, 2 * REACH + 1))
    valid = np.asarray(binary_erosion(~_whole(sample, mask), square), bool)
    if not valid.any():
        raise NotMeasurable("no window of SSIM is wholly outside the mask")
    maps = [_similar(a, b) for a, b in zip(source.images, edit.images, strict=True)]
    return float(np.stack(maps)[valid].mean())


def _whole(sample: Sample, mask: Mask) -> np.ndarray:
    video = sample.source.video
    return np.broadcast_to(mask.inside(sample), (video.frames, video.height, video.width))


def _similar(a_HWC: np.ndarray, b_HWC: np.ndarray) -> np.ndarray:
    """SSIM around every pixel, mean over colours, H W."""
    found: Any = structural_similarity(
        a_HWC, b_HWC, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        full=True,
    )  # fmt: skip
    return found[1].mean(axis=2)
