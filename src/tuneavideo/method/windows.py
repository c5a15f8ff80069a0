"""Overlapping windows, in which a UNet predicts clips that are too long for one call.

Every window starts with the clip's first frame, so that all refer to the same image. Where windows overlap, predictions
are blended at every step (MultiDiffusion, Bar-Tal et al. 2023, eq. 5; Gen-L-Video, Wang et al. 2023). Positions of
windows depend on the timestep, so that no border stays in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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

    def blended(
        self, predict: Callable[[Tensor], Tensor], read: Callable[[list[int]], Tensor], frames: int, t: float
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Predict a clip window by window; yields frames in order, as soon as no later window contains them.

        Memory is that of one window. Frames that were yielded are not read again and may be changed.

        Args:
            predict: Maps the frames of a window, `B C T H W`, to a prediction of that shape.
            read: Returns the frames with the given numbers, `B C T H W`.
            frames: Frames of the clip.
            t: Timestep.

        Yields:
            Numbers of frames, and their blended prediction.
        """
        if self.holds(frames):
            yield list(range(frames)), predict(read(list(range(frames))))
            return
        spans, first = self.spans(frames, t), read([0])
        following = [span.start for span in spans[1:]] + [frames]
        pending = None
        for span, weights, after in zip(spans, self.weights(frames, t), following, strict=True):
            output = predict(torch.cat([first, read(list(span))], dim=2))
            total = output[:, :, 1:].float() * torch.tensor(weights, device=output.device)[:, None, None]
            if pending is None:
                yield [0], output[:, :, :1]
            else:
                total[:, :, : pending.shape[2]] += pending
            ready = after - span.start
            yield list(span)[:ready], total[:, :, :ready].to(output.dtype)
            pending = total[:, :, ready:]


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
        parts = self.windows.blended(
            lambda part: self.video(part, t, text),
            lambda frames: x_BCTHW[:, :, frames],
            x_BCTHW.shape[2],
            float(t.flatten()[0]),
        )
        return torch.cat([output for _, output in parts], dim=2)
