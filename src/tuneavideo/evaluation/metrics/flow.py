"""Optical flow: RAFT if torchvision is installed, OpenCV's DIS otherwise. Flows are H W 2: x and y in pixels."""

from __future__ import annotations

import importlib.util
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.constants import HF_HUB_OFFLINE

from tuneavideo.video import Video
from tuneavideo.video.flow import dense_flow, grey

logger = logging.getLogger(__name__)


class Flows(NamedTuple):
    """T-1 flows of T frames in each direction: from every frame to the next, and back."""

    forward: list[np.ndarray]
    backward: list[np.ndarray]


class Flow(Protocol):
    """An optical flow estimator.

    Attributes:
        name: Name in `scores.json`.
        revision: Version or weights.
    """

    name: str
    revision: str

    def flows(self, video: Video) -> Flows: ...


def load_flow() -> Flow:
    """Load RAFT if torchvision works and its weights are available, otherwise DIS."""
    if importlib.util.find_spec("torchvision"):
        try:
            return Raft()
        except (ImportError, RuntimeError, OSError) as error:  # a build for another torch; no weights
            logger.warning("RAFT is not available, using DIS flow: %s", " ".join(str(error).split())[:200])
    return Dis()


class Dis:
    """Dense inverse search (Kroeger et al. 2016), OpenCV's `medium` preset."""

    def __init__(self) -> None:
        self.name, self.revision = "DIS flow (OpenCV)", cv2.__version__

    def flows(self, video: Video) -> Flows:
        """Estimate the flows of a clip in both directions."""
        images = [grey(image) for image in video.images]
        return Flows([dense_flow(a, b) for a, b in pairwise(images)], [dense_flow(b, a) for a, b in pairwise(images)])


class Raft:
    """RAFT (Teed & Deng 2020), torchvision's large model; sides are padded to multiples of 8, at least 128."""

    def __init__(self, pretrained: bool = True) -> None:
        from torchvision.models.optical_flow import (  # pyright: ignore[reportMissingImports]
            Raft_Large_Weights,
            raft_large,
        )

        weights = Raft_Large_Weights.DEFAULT if pretrained else None
        if (
            weights
            and HF_HUB_OFFLINE
            and not Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name).is_file()
        ):
            raise FileNotFoundError(f"{weights.url} is not downloaded, and HF_HUB_OFFLINE is set")
        self.name, self.revision = "RAFT large (torchvision)", str(weights)
        self.device = PartialState().device
        self.model: Any = raft_large(weights=weights, progress=False).eval().to(self.device)

    def flows(self, video: Video) -> Flows:
        """Estimate the flows of a clip in both directions."""
        frames = [self._preprocess(image) for image in video.images]
        size = video.height, video.width
        forward = [self._flow(a, b, *size) for a, b in pairwise(frames)]
        return Flows(forward, [self._flow(b, a, *size) for a, b in pairwise(frames)])

    def _preprocess(self, image_HWC: np.ndarray) -> torch.Tensor:
        below, right = (max(128, -(-side // 8) * 8) - side for side in image_HWC.shape[:2])
        padded = np.pad(image_HWC, ((0, below), (0, right), (0, 0)), mode="edge")
        return torch.from_numpy(padded).to(self.device).permute(2, 0, 1)[None] / 127.5 - 1

    @torch.no_grad()
    def _flow(self, a: torch.Tensor, b: torch.Tensor, height: int, width: int) -> np.ndarray:
        flow = self.model(a, b)[-1][0, :, :height, :width]
        return flow.permute(1, 2, 0).contiguous().cpu().numpy()


def warp(image: np.ndarray, flow_HW2: np.ndarray) -> np.ndarray:
    """Sample an image (H W or H W C, float32) at the flow's target of every pixel."""
    target = _target(flow_HW2)
    return cv2.remap(image, target[..., 0], target[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def consistent_pixels(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Find the pixels that are neither occluded nor leave the frame, by forward-backward consistency.

    Args:
        forward: Flow from a frame to the next, H W 2.
        backward: Flow from the next frame back, H W 2.

    Returns:
        Booleans, H W. The bound is |f + b|^2 < 0.01 (|f|^2 + |b|^2) + 0.5. Source: Sundaram et al. 2010.
    """
    back = warp(backward, forward)
    near = _squared(forward + back) < 0.01 * (_squared(forward) + _squared(back)) + 0.5
    target = _target(forward)
    height, width = forward.shape[:2]
    within = (target >= 0).all(axis=2) & (target[..., 0] <= width - 1) & (target[..., 1] <= height - 1)
    return near & within


def _target(flow: np.ndarray) -> np.ndarray:
    rows, columns = np.mgrid[: flow.shape[0], : flow.shape[1]].astype(np.float32)
    return np.stack([columns, rows], axis=2) + flow


def _squared(flow: np.ndarray) -> np.ndarray:
    return (flow**2).sum(axis=2)
