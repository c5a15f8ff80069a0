"""Work of a GPU that is recorded once and replayed (CUDA graphs).

The CPU then starts one piece of work instead of some thousand, which takes it longer than the GPU needs for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet

logger = logging.getLogger(__name__)
switched_on = True  # for measurements


class Recording:
    """A function of tensors, recorded with these inputs; calls take other ones of the same shapes.

    Nothing is computed while it is recorded. What a call returns is overwritten by the next.
    """

    def __init__(self, run: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Any = None) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.output = run(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.output


def recorded(run: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Any = None) -> Recording | None:
    """A recording, or none and a warning where the work does not let itself be recorded."""
    try:
        return Recording(run, inputs, pool)
    except Exception as error:  # whatever it is, the work can be done without
        logger.warning("work of the GPU is started piece by piece, as recording failed: %s", str(error).splitlines()[0])
        return None


@dataclass(frozen=True)
class RecordingUNet(VideoUNet):
    """A `VideoUNet` that records calls which come again, without gradients; its weights may change in between."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "known", {})
        object.__setattr__(self, "pool", torch.cuda.graph_pool_handle())

    def __call__(self, x_BCTHW: Tensor, t: Tensor, text: Conditions | Tensor) -> Tensor:
        """As `VideoUNet`."""
        told: Any = Conditions.of(text)
        if torch.is_grad_enabled() or len(told.tensors()) > 1 or self.control:
            return super().__call__(x_BCTHW, t, text)
        known: dict[Any, Any] = vars(self)["known"]
        inputs = (x_BCTHW, t, told.text_BLD)
        key = (self.clip.inject, *((x.shape, x.dtype) for x in inputs))
        if key not in known:  # the first call builds kernels
            known[key] = None
            return super().__call__(*inputs)
        if known[key] is None:
            known[key] = recorded(super().__call__, inputs, vars(self)["pool"]) or super().__call__
        made: Tensor = known[key](*inputs)
        return made.clone()


def recording(video: VideoUNet) -> VideoUNet:
    """`video`, recorded where it is on a GPU."""
    cuda = switched_on and type(video) is VideoUNet and video.unet.device.type == "cuda"
    return RecordingUNet(video.unet, video.clip, video.control) if cuda else video
