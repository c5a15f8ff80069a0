"""Inner features of the UNet, used again at the next steps of a sampling (DeepCache, Ma et al. 2024).

From one step to the next the inner layers see almost the same, and they cost most. So they are computed at every so
many steps; in between only the outermost layers run, on the last outputs of the inner ones.
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

# Layers of the last up block, and one less of the first down block, that run at every step.
OUTER = 2


@dataclass
class Features:
    """Outputs of the inner layers for one text, and the number of calls since sampling began."""

    text: Tensor
    calls: int = 0
    outputs: dict[nn.Module, Any] = field(default_factory=dict)


class ReusingUNet(VideoUNet):
    """A `VideoUNet` for one sampling, which computes its inner features at every `every`-th call with the same text.

    Calls with other texts (the halves of guidance, when they are not in one batch) have features of their own.
    """

    def __init__(self, video: VideoUNet, every: int) -> None:
        super().__init__(video.unet, video.clip, video.control)
        object.__setattr__(self, "every", every)
        object.__setattr__(self, "known", [])

    every: int
    known: list[Features]

    def __call__(self, x_BCTHW: Tensor, t: Tensor, text: Conditions | Tensor) -> Tensor:
        """As `VideoUNet`, nearly."""
        features = self._features(Conditions.of(text).text_BLD)
        fresh = features.calls % self.every == 0
        features.calls += 1
        with remembering(self.unet, features.outputs, fresh):
            return super().__call__(x_BCTHW, t, text)

    def _features(self, text_BLD: Tensor) -> Features:
        for features in self.known:
            if features.text is text_BLD or (
                features.text.shape == text_BLD.shape and torch.equal(features.text, text_BLD)
            ):
                return features
        self.known.append(Features(text_BLD))
        return self.known[-1]


def reusing(video: VideoUNet, every: int) -> VideoUNet:
    """`video` for one sampling, with inner features computed at every `every`-th step; 1 changes nothing."""
    return video if every == 1 else ReusingUNet(video, every)


def inner_layers(unet: UNet2DConditionModel) -> list[nn.Module]:
    """Every layer but the first convolution, the outermost layers of the first and the last block, and the output."""
    first, last = unet.down_blocks[0], unet.up_blocks[-1]
    inner = [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]
    for block, kept in ((first, slice(OUTER - 1, None)), (last, slice(None, -OUTER))):
        for name in ("resnets", "attentions"):
            inner.extend(getattr(block, name, [])[kept])
        inner.extend(getattr(block, "downsamplers", None) or [])
    return [layer for layer in inner if layer is not None]


@contextmanager
def remembering(unet: UNet2DConditionModel, outputs: dict[nn.Module, Any], fresh: bool) -> Iterator[None]:
    """Within it, inner layers note their outputs (`fresh`) or give those they noted."""
    layers = inner_layers(unet)
    for layer in layers:
        layer.forward = _noting(layer, layer.forward, outputs) if fresh else _giving(layer, outputs)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


def _noting(layer: nn.Module, forward: Callable[..., Any], outputs: dict[nn.Module, Any]) -> Callable[..., Any]:
    def noted(*args: Any, **kwargs: Any) -> Any:
        outputs[layer] = forward(*args, **kwargs)
        return outputs[layer]

    return noted


def _giving(layer: nn.Module, outputs: dict[nn.Module, Any]) -> Callable[..., Any]:
    return lambda *_, **__: outputs[layer]
