"""Long clips: a UNet that sees a few frames at a time is called on all of a clip, in overlapping windows.

Every window has the clip's first frame in front, so that all refer to the same picture, and where windows overlap
their predictions are blended at every step, so that they agree on one clip (MultiDiffusion, Bar-Tal et al. 2023, eq. 5;
Gen-L-Video, Wang et al. 2023). Where the windows lie changes with the timestep: no border stays in one place.
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

# Multiples of it spread evenly over 0..1, however many are taken.
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Windows:
    """How a clip is cut.

    Attributes:
        size: Frames of a window, the clip's first among them; at least 2.
        overlap: Frames, at least, that a window shares with the next, besides the first; at most `size` - 2.
        moving: Whether windows lie elsewhere at every timestep.
    """

    size: int
    overlap: int
    moving: bool = True

    @classmethod
    def of(cls, settings: Sampling, frames: int) -> Windows:
        """Windows of these settings on a clip of so many frames; one window if they set none."""
        size = max(2, settings.window or frames)
        return cls(size, (size - 1) // 3 if settings.window_overlap is None else settings.window_overlap)

    def holds(self, frames: int) -> bool:
        """Whether one window sees a whole clip."""
        return frames <= self.size

    def spans(self, frames: int, t: float = 0.0) -> list[range]:
        """The frames of each window at timestep `t` but the first frame, which all of them see; rising."""
        if self.holds(frames):
            return [range(1, frames)]
        length = self.size - 1
        step, last = length - self.overlap, frames - length
        shift = int(t * GOLDEN % 1 * step) if self.moving else 0
        begins = range(1 - shift, last + step, step)
        return [range(begin, begin + length) for begin in sorted({min(max(begin, 1), last) for begin in begins})]

    def around(self, frame: int, frames: int) -> list[int]:
        """Frames of the window that `frame` (above 0) is in the middle of, rising, with the clip's first in front.

        A window that reaches beyond an end of the clip goes on at the other end, so that with every frame drawn
        equally often, every frame is in equally many windows. Such a window has one gap, as others have behind the
        first frame.
        """
        length, others = self.size - 1, frames - 1
        return [0, *sorted((frame - 1 - length // 2 + place) % others + 1 for place in range(length))]

    def shares(self, frames: int, t: float = 0.0) -> list[list[float]]:
        """How much each frame of each of the `spans` counts; over the windows that see a frame it is 1 in all.

        A window counts less towards its ends (as the square of a sine), where frames lack neighbours.
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
        self, predict: Callable[[Tensor], Tensor], look: Callable[[list[int]], Tensor], frames: int, t: float
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Predict a clip window by window; yields frames, in order, as soon as no later window sees them.

        Memory is that of one window. What was yielded may be changed at once: it is not looked at again.

        Args:
            predict: From the frames of a window, `B C T H W`, to a prediction of that shape.
            look: The frames of these numbers, `B C T H W`.
            frames: Of the clip.
            t: Timestep.
        """
        if self.holds(frames):
            yield list(range(frames)), predict(look(list(range(frames))))
            return
        spans, first = self.spans(frames, t), look([0])
        following = [span.start for span in spans[1:]] + [frames]
        pending = None
        for span, shares, after in zip(spans, self.shares(frames, t), following, strict=True):
            output = predict(torch.cat([first, look(list(span))], dim=2))
            total = output[:, :, 1:].float() * torch.tensor(shares, device=output.device)[:, None, None]
            if pending is None:
                yield [0], output[:, :, :1]
            else:
                total[:, :, : pending.shape[2]] += pending
            ready = after - span.start
            yield list(span)[:ready], total[:, :, :ready].to(output.dtype)
            pending = total[:, :, ready:]


@dataclass(frozen=True)
class WindowedUNet:
    """Stands in for a `VideoUNet` where clips are longer than a window."""

    video: VideoUNet
    windows: Windows

    @property
    def clip(self) -> ClipLayout:
        """What the layers are told of the batch."""
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
