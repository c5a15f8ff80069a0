"""Dense optical flow between the frames of a clip (DIS, Kroeger et al. 2016, by OpenCV)."""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

SIDE = 256
"""Longer side of the images between which `neighbour_flows` estimates flow, in pixels."""


def grey(image_HWC: np.ndarray) -> np.ndarray:
    """Convert an image, uint8 RGB, to grey levels."""
    return cv2.cvtColor(np.ascontiguousarray(image_HWC), cv2.COLOR_RGB2GRAY)


def dense_flow(a_HW: np.ndarray, b_HW: np.ndarray) -> np.ndarray:
    """Estimate the flow from one grey image to another: float32 `H W 2`, x and y in pixels."""
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return search.calc(a_HW, b_HW, None)  # pyright: ignore[reportCallIssue, reportArgumentType]


def neighbours(frame: int, frames: int, radius: int) -> list[int]:
    """Return the other frames of a clip at a distance of at most `radius` from a frame."""
    return [other for other in range(max(0, frame - radius), min(frames, frame + radius + 1)) if other != frame]


def neighbour_flows(images: Iterable[np.ndarray], height: int, width: int, radius: int) -> list[np.ndarray]:
    """Estimate the flow from every frame of a clip to its `neighbours`.

    Args:
        images: Frames `H W C`, uint8 RGB.
        height: Height of the flows in sites, such as those of latents.
        width: Their width in sites.
        radius: Largest distance of a neighbour, in frames.

    Returns:
        For every frame float16 `K height width 2`, for K neighbours: x and y in sites.
    """
    greys = [_resized(grey(image)) for image in images]
    scale = np.array([width / greys[0].shape[1], height / greys[0].shape[0]], np.float32)

    def flow(a: int, b: int) -> np.ndarray:
        return cv2.resize(dense_flow(greys[a], greys[b]), (width, height), interpolation=cv2.INTER_AREA) * scale

    flows = ([flow(a, b) for b in neighbours(a, len(greys), radius)] for a in range(len(greys)))
    return [np.array(each, np.float16).reshape(-1, height, width, 2) for each in flows]


def _resized(grey_HW: np.ndarray) -> np.ndarray:
    scale = SIDE / max(grey_HW.shape)
    height, width = (max(16, round(side * scale)) for side in grey_HW.shape)
    return cv2.resize(grey_HW, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
