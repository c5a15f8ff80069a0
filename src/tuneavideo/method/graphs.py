"""A video UNet whose calls are recorded and replayed on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuneavideo.kernels import graphs
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet


@dataclass(frozen=True)
class RecordingUNet(VideoUNet):
    """A `VideoUNet` that records repeated calls without gradients; its weights may change in place between calls."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "recordings", {})
        object.__setattr__(self, "pool", graphs.new_pool())

    def __call__(self, x_BCTHW: Tensor, t: Tensor, text: Conditions | Tensor) -> Tensor:
        """Predict noise or velocity; see `VideoUNet`."""
        conditions: Any = Conditions.of(text)
        if torch.is_grad_enabled() or len(conditions.tensors()) > 1 or self.control:
            return super().__call__(x_BCTHW, t, text)
        recordings: dict[Any, Any] = vars(self)["recordings"]
        inputs = (x_BCTHW, t, conditions.text_BLD)
        key = (self.clip.inject, *((x.shape, x.dtype) for x in inputs))
        if key not in recordings:  # the first call builds kernels
            recordings[key] = None
            return super().__call__(*inputs)
        if recordings[key] is None:
            recordings[key] = graphs.record(super().__call__, inputs, vars(self)["pool"]) or super().__call__
        output: Tensor = recordings[key](*inputs)
        return output.clone()


def recording(video: VideoUNet) -> VideoUNet:
    """Return `video` as a `RecordingUNet` where its device can record."""
    if type(video) is not VideoUNet or not graphs.supports(video.unet.device):
        return video
    return RecordingUNet(video.unet, video.clip, video.control)
