"""Feature reuse over sampling steps (DeepCache, Ma et al. 2024).

The inner layers of a UNet cost most and change little from step to step. They are computed every few steps; in between
only the outermost layers run, on the last outputs of the inner ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet

# Layers of the last up block that run at every step; of the first down block one less.
OUTER = 2


@dataclass
class Features:
    """Outputs of the inner layers for one text, and the number of calls with it."""

    text: Tensor
    calls: int = 0
    outputs: dict[nn.Module, Any] = field(default_factory=dict)


class ReusingUNet(VideoUNet):
    """A `VideoUNet` for one sampling, which computes inner features at every `every`-th call with the same text.

    Calls with different texts (the two predictions of guidance, when not in one batch) have separate features.
    """

    def __init__(self, video: VideoUNet, every: int) -> None:
        super().__init__(video.unet, video.clip, video.control)
        object.__setattr__(self, "every", every)
        object.__setattr__(self, "features", [])

    every: int
    features: list[Features]

    def __call__(self, x_BCTHW: Tensor, t: Tensor, text: Conditions | Tensor) -> Tensor:
        """Predict noise or velocity, approximately; see `VideoUNet`."""
        features = self._features(Conditions.of(text).text_BLD)
        fresh = features.calls % self.every == 0
        features.calls += 1
        with cached_features(self.unet, features.outputs, fresh):
            return super().__call__(x_BCTHW, t, text)

    def _features(self, text_BLD: Tensor) -> Features:
        for features in self.features:
            if features.text is text_BLD or (
                features.text.shape == text_BLD.shape and torch.equal(features.text, text_BLD)
            ):
                return features
        self.features.append(Features(text_BLD))
        return self.features[-1]


def reusing(video: VideoUNet, every: int) -> VideoUNet:
    """Return `video` for one sampling, with inner features computed at every `every`-th step; 1 changes nothing."""
    return video if every == 1 else ReusingUNet(video, every)


def inner_layers(unet: UNet2DConditionModel) -> list[nn.Module]:
    """Return all layers but the first convolution, the outermost layers of the first and last block, and the output."""
    first, last = unet.down_blocks[0], unet.up_blocks[-1]
    inner = [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]
    for block, kept in ((first, slice(OUTER - 1, None)), (last, slice(None, -OUTER))):
        for name in ("resnets", "attentions"):
            inner.extend(getattr(block, name, [])[kept])
        inner.extend(getattr(block, "downsamplers", None) or [])
    return [layer for layer in inner if layer is not None]


@contextmanager
def cached_features(unet: UNet2DConditionModel, outputs: dict[nn.Module, Any], fresh: bool) -> Iterator[None]:
    """Make inner layers store their outputs (`fresh`) or return the stored ones, within the context."""
    layers = inner_layers(unet)
    for layer in layers:
        layer.forward = _storing(layer, layer.forward, outputs) if fresh else _returning(layer, outputs)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


def _storing(layer: nn.Module, forward: Callable[..., Any], outputs: dict[nn.Module, Any]) -> Callable[..., Any]:
    def stored(*args: Any, **kwargs: Any) -> Any:
        outputs[layer] = forward(*args, **kwargs)
        return outputs[layer]

    return stored


def _returning(layer: nn.Module, outputs: dict[nn.Module, Any]) -> Callable[..., Any]:
    return lambda *_, **__: outputs[layer]
