"""ControlNet conditioning: maps of a clip (edges, depth or given ones) and the residuals computed from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from einops import rearrange
from PIL import Image
from torch import Tensor

from tuneavideo import video as videos
from tuneavideo.errors import SettingsError
from tuneavideo.video import AnyVideo

DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
# Canny's two thresholds, as in the published ControlNet's demo.
THRESHOLDS = (100, 200)


@dataclass(frozen=True)
class Control:
    """A ControlNet with the maps of a clip.

    Attributes:
        net: The ControlNet; it takes frames as images.
        maps_TCHW: Map of each frame, in 0..1, at the size of the frames.
        scale: Strength; 0 adds nothing.
    """

    net: ControlNetModel
    maps_TCHW: Tensor
    scale: float

    def __call__(self, x_NCHW: Tensor, t: Tensor, text_NLD: Tensor, added: dict[str, Any] | None) -> dict[str, Any]:
        """Return residuals for the UNet's down path and middle, by the UNet's keywords; N images are whole clips."""
        maps_NCHW = self.maps_TCHW.repeat(len(x_NCHW) // len(self.maps_TCHW), 1, 1, 1)
        down, middle = self.net(
            x_NCHW.to(self.net.dtype), t, text_NLD.to(self.net.dtype), maps_NCHW, conditioning_scale=self.scale,
            added_cond_kwargs=added, return_dict=False,
        )  # fmt: skip
        return {
            "down_block_additional_residuals": [each.to(x_NCHW.dtype) for each in down],
            "mid_block_additional_residual": middle.to(x_NCHW.dtype),
        }


def maps(kind: str, source: AnyVideo) -> Tensor:
    """Compute or read the maps `T 3 H W` in 0..1 of a clip's frames.

    Args:
        kind: `canny`, `depth`, or the path of a video or folder of maps, one per frame of the clip.
        source: The clip.

    Raises:
        SettingsError: `kind` is none of these.
        VideoError: The maps cannot be read, or are fewer than the frames.
    """
    if kind in COMPUTED:
        frames_THWC = COMPUTED[kind](source)
    elif Path(kind).exists():
        size = (source.width, source.height)
        frames_THWC = videos.read(kind, count=source.frames, size=size, fit="stretch").frames_THWC
    else:
        known = ", ".join(COMPUTED)
        raise SettingsError(f"control {kind!r}: neither {known} nor the path of a video or folder of maps")
    return rearrange(torch.from_numpy(np.ascontiguousarray(frames_THWC)), "t h w c -> t c h w").float() / 255


def edges(source: AnyVideo) -> np.ndarray:
    """Compute Canny edges of every frame, white on black, `T H W C` in 0..255."""
    import cv2

    found = [cv2.Canny(frame, *THRESHOLDS) for frame in source.images]
    return np.stack(found)[..., None].repeat(3, axis=3)


def depth(source: AnyVideo) -> np.ndarray:
    """Estimate the depth of every frame, `T H W C` in 0..255; the nearest point of the clip is white."""
    from transformers import pipeline

    try:
        model = pipeline("depth-estimation", model=DEPTH_MODEL)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"control depth needs a model that is not here: 'hf download {DEPTH_MODEL}', or give maps of your own"
        ) from error
    found = [model(Image.fromarray(frame))["predicted_depth"] for frame in source.images]
    size = (source.height, source.width)
    far = torch.stack([torch.nn.functional.interpolate(each[None, None], size, mode="bicubic")[0, 0]
                       for each in (each.reshape(each.shape[-2:]).float() for each in found)])  # fmt: skip
    near = (far - far.min()) / (far.max() - far.min()).clamp_min(1e-6)
    return (near * 255).byte().numpy()[..., None].repeat(3, axis=3)


COMPUTED: dict[str, Callable[[AnyVideo], np.ndarray]] = {"canny": edges, "depth": depth}
