"""PSNR and SSIM of the background, the pixels outside a mask. Pixels are 0..255."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import binary_erosion
from skimage.metrics import structural_similarity

from tuneavideo.evaluation.metrics.edit_pair import EditPair, NotMeasurable
from tuneavideo.video import Video

MIN_ERROR = 1e-10
"""Smallest squared error of PSNR, at which it is 148 dB."""
SSIM_RADIUS = 5
"""Pixels from the centre of an SSIM window (11 x 11) to its edge."""

Mask = Callable[[EditPair], np.ndarray]
"""From an edit to where it may change the picture: booleans, T H W or 1 H W."""


def background_psnr(pair: EditPair, mask: Mask) -> float:
    """Compute the PSNR of the pixels outside the mask, over all frames at once, in dB.

    Implementations that multiply both pictures by the mask count its inside as perfect. This one leaves it out.
    """
    outside = ~_full_mask(pair, mask)
    if not outside.any():
        raise NotMeasurable("nothing is outside the mask")
    return psnr(pair.source.video, pair.edit.video, outside)


def psnr(a: Video, b: Video, selected_THW: np.ndarray) -> float:
    """Compute the peak signal-to-noise ratio of the selected pixels, in dB, at most 148."""
    error = np.mean((a.frames_THWC[selected_THW].astype(np.float64) - b.frames_THWC[selected_THW]) ** 2)
    return float(10 * np.log10(255**2 / max(error, MIN_ERROR)))


def background_ssim(pair: EditPair, mask: Mask) -> float:
    """Compute the structural similarity outside the mask, at most 1: Gaussian windows, sigma 1.5, by scikit-image.

    It is the mean over the pixels whose whole window is outside the mask. Source: Wang et al. 2004.
    """
    source, edit = pair.source.video, pair.edit.video
    if min(source.width, source.height) <= 2 * SSIM_RADIUS:
        raise NotMeasurable(f"frames of {source.width} x {source.height} are smaller than a window of SSIM")
    window = np.ones((1, 2 * SSIM_RADIUS + 1, 2 * SSIM_RADIUS + 1))
    valid = np.asarray(binary_erosion(~_full_mask(pair, mask), window), bool)
    if not valid.any():
        raise NotMeasurable("no window of SSIM is wholly outside the mask")
    maps = [_ssim_map(a, b) for a, b in zip(source.images, edit.images, strict=True)]
    return float(np.stack(maps)[valid].mean())


def _full_mask(pair: EditPair, mask: Mask) -> np.ndarray:
    video = pair.source.video
    return np.broadcast_to(mask(pair), (video.frames, video.height, video.width))


def _ssim_map(a_HWC: np.ndarray, b_HWC: np.ndarray) -> np.ndarray:
    """SSIM around every pixel, mean over colours, H W."""
    _, ssim_HWC, *_ = structural_similarity(
        a_HWC, b_HWC, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        full=True,
    )  # fmt: skip
    return ssim_HWC.mean(axis=2)
