"""Masks of a clip: pixels that an edit may change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from scipy.ndimage import distance_transform_edt

from tuneavideo.errors import VideoError
from tuneavideo.video.clip import AnyVideo, Fit
from tuneavideo.video.reading import read


def read_mask(path: Path, video: AnyVideo, fit: Fit) -> np.ndarray:
    """Read a mask from an image, a video or a folder of images; bright pixels are inside.

    Args:
        path: One image, or as many frames as the video has.
        video: The clip that the mask belongs to. The mask is resized to its size.
        fit: How the clip was resized, see `video.resize`.

    Returns:
        True where an edit may change the picture, T H W or 1 H W.

    Raises:
        VideoError: It cannot be read, has other than one or the video's number of frames, or leaves no background.
    """
    pictures = read(path, size=(video.width, video.height), fit=fit)
    if pictures.frames not in (1, video.frames):
        raise VideoError(f"{path}: expected 1 frame or {video.frames}, as the clip has; found {pictures.frames}")
    inside = pictures.frames_THWC.mean(axis=3) >= 128
    if inside.all():
        raise VideoError(f"{path}: all of it is bright, so nothing is background; make dark what should stay")
    return inside


@dataclass(frozen=True)
class Mask:
    """A clip, and where edits may change it.

    Attributes:
        source: The clip.
        inside_THW: True where edits may change it, at its size; one frame for all, or as many as it has.
    """

    source: AnyVideo
    inside_THW: np.ndarray

    @classmethod
    def read(cls, path: Path, source: AnyVideo, fit: Fit) -> Self:
        """Read the mask of a clip; see `read_mask`. Raises VideoError also for a mask that lets nothing change."""
        inside_THW = read_mask(path, source, fit)
        if not inside_THW.any():
            raise VideoError(f"{path}: all of it is dark, so nothing may change; make bright what may")
        return cls(source, inside_THW)

    @classmethod
    def of_sites(cls, source: AnyVideo, changed_THW: np.ndarray) -> Self:
        """Make the mask of changed latents: True where an edit may change the clip, at the size of the latents."""
        factors = source.height // changed_THW.shape[1], source.width // changed_THW.shape[2]
        return cls(source, changed_THW.repeat(factors[0], axis=1).repeat(factors[1], axis=2))

    def within(self, other: Mask | None) -> Mask:
        """Return the mask of what both let change."""
        return self if other is None else Mask(self.source, self.inside_THW & other.inside_THW)

    def fractions(self, height: int, width: int) -> np.ndarray:
        """Return the fraction of each latent's pixels that is inside, float32 `T height width`."""
        frames, rows, columns = self.inside_THW.shape
        cells = self.inside_THW.reshape(frames, height, rows // height, width, columns // width)
        return cells.mean(axis=(2, 4), dtype=np.float32)

    def weights(self, edge: int) -> Iterator[np.ndarray]:
        """Yield the weight of the edit in each frame: 0 outside, rising to 1 within `edge` pixels inside (`H W`)."""
        weight_HW = np.empty(0)
        for number in range(self.source.frames):
            if number < len(self.inside_THW):
                inside_HW = self.inside_THW[number]
                depth_HW = np.full(inside_HW.shape, edge) if inside_HW.all() else distance_transform_edt(inside_HW)
                weight_HW = np.clip(np.asarray(depth_HW) / edge, 0, 1).astype(np.float32)
            yield weight_HW
