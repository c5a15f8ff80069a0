"""Parts of the tests of metrics that others use."""

from __future__ import annotations

import cv2
import numpy as np

from tuneavideo.video import Video

SIDE = 64


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Blotches a few pixels wide, such as flow can follow, H W 3."""
    raw = np.random.default_rng(seed).normal(size=(*shape, 3))
    return np.clip(128 + 220 * cv2.GaussianBlur(raw, (0, 0), 1.5), 0, 255).astype(np.uint8)


def passing(step: tuple[int, int], seed: int = 0, frames: int = 6) -> Video:
    """A texture that moves by `step` (x, y) from frame to frame."""
    far = 5 * max(map(abs, (*step, 1)))
    sheet = noise((SIDE + 2 * far, SIDE + 2 * far), seed)
    corners = [(far - t * step[1], far - t * step[0]) for t in range(frames)]
    return Video(np.stack([sheet[y : y + SIDE, x : x + SIDE] for y, x in corners]), 8)


def still(seed: int = 0, frames: int = 6) -> Video:
    return passing((0, 0), seed, frames)
