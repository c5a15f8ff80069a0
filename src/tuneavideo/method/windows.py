"""Overlapping windows, in which a UNet predicts clips that are too long for one call.

Every window starts with the clip's first frame, so that all refer to the same image. Where windows overlap, predictions
are blended at every step (MultiDiffusion, Bar-Tal et al. 2023, eq. 5; Gen-L-Video, Wang et al. 2023). Positions of
windows depend on the timestep, so that no border stays in one place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tuneavideo.method.attention import ClipLayout
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet
from tuneavideo.settings import Sampling

# Fractional parts of its multiples are spread evenly over 0..1.
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Windows:
    """Division of a clip into windows.

    Attributes:
        size: Frames of a window, including the clip's first; at least 2.
        overlap: Least number of frames that neighbouring windows share, besides the first; at most `size` - 2.
        moving: Whether positions depend on the timestep.
    """

    size: int
    overlap: int
    moving: bool = True

    @classmethod
    def of(cls, settings: Sampling, frames: int) -> Windows:
        """Return the windows that settings ask for; one window of all `frames` if they set none."""
        size = max(2, settings.window or frames)
        return cls(size, (size - 1) // 3 if settings.window_overlap is None else settings.window_overlap)

    def holds(self, frames: int) -> bool:
        """Return whether one window holds a whole clip."""
        return frames <= self.size

    def spans(self, frames: int, t: float = 0.0) -> list[range]:
        """Return the frames of each window at timestep `t`, without the clip's first frame."""
        if self.holds(frames):
            return [range(1, frames)]
        length = self.size - 1
        step, last = length - self.overlap, frames - length
        shift = int(t * GOLDEN % 1 * step) if self.moving else 0
        begins = range(1 - shift, last + step, step)
        return [range(begin, begin + length) for begin in sorted({min(max(begin, 1), last) for begin in begins})]

    def around(self, frame: int, frames: int) -> list[int]:
        """Return the frames of the window around `frame` (above 0), rising, after the clip's first frame.

        A window that reaches beyond an end of the clip continues at the other end. If every frame is drawn equally
        often, every frame is then in equally many windows.
        """
        length, others = self.size - 1, frames - 1
        return [0, *sorted((frame - 1 - length // 2 + place) % others + 1 for place in range(length))]

    def weights(self, frames: int, t: float = 0.0) -> list[list[float]]:
        """Return the blending weight of each frame of each of the `spans`; the weights of a frame sum to 1.

        Weights fall towards the ends of a window, as the square of a sine.
        """
        spans = self.spans(frames, t)
        weights = [[self._weight(place, len(span)) for place in range(len(span))] for span in spans]
        sums = [0.0] * frames
        for span, own in zip(spans, weights, strict=True):
            for frame, weight in zip(span, own, strict=True):
                sums[frame] += weight
        return [
            [weight / sums[frame] for frame, weight in zip(span, own, strict=True)]
            for span, own in zip(spans, weights, strict=True)
        ]

    def _weight(self, place: int, length: int) -> float:
        near = min(place + 1, length - place, self.overlap + 1)
        return math.sin(math.pi / 2 * near / (self.overlap + 1)) ** 2


@dataclass(frozen=True)
class WindowedUNet:
    """A `VideoUNet` for clips longer than a window."""

    video: VideoUNet
    windows: Windows

    @property
    def clip(self) -> ClipLayout:
        """The layout of the batch that the layers share."""
        return self.video.clip

    def __call__(self, x_BCTHW: Tensor, t: Tensor, text: Conditions | Tensor) -> Tensor:
        """Predict noise or velocity, `B C T H W`; arguments as of `VideoUNet`, but `t` is one for all clips."""
        windows, frames, blended = self.windows, x_BCTHW.shape[2], None
        if windows.holds(frames):
            return self.video(x_BCTHW, t, text)
        at = float(t.flatten()[0])
        for span, weights in zip(windows.spans(frames, at), windows.weights(frames, at), strict=True):
            part = torch.cat([x_BCTHW[:, :, :1], x_BCTHW[:, :, span.start : span.stop]], dim=2)
            output = self.video(part, t, text)
            if blended is None:  # the prediction of the first frame is that of the first window
                blended = torch.zeros(x_BCTHW.shape, device=output.device)
                blended[:, :, :1] = output[:, :, :1]
            weights_T11 = torch.tensor(weights, device=output.device)[:, None, None]
            blended[:, :, span.start : span.stop] += output[:, :, 1:].float() * weights_T11
        assert blended is not None, "a clip has windows"
        return blended.to(x_BCTHW.dtype)
