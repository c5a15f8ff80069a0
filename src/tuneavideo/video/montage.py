"""Montages of clips with labels: side by side, and contact sheets."""

import math
import textwrap
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tuneavideo.video import AnyVideo, Video, VideoStream, resize

MIN_HEIGHT = 192  # rows at which a label below can be read
GAP = 8  # pixels between clips
WHITE = 255


def side_by_side(videos: Sequence[AnyVideo], *, labels: Sequence[str] | None = None) -> VideoStream:
    """Join clips left to right at the height of the tallest, each above its label.

    Rate and sound are those of the first clip. A clip that ends early repeats its last frame. Clips of less than 192
    rows are enlarged by an integer factor, so that labels can be read.
    """
    tallest = max(video.height for video in videos)
    height = tallest * math.ceil(MIN_HEIGHT / tallest)
    named = [] if labels is None else zip(labels, videos, strict=True)
    below = [_caption(label, _width_at(height, video), height // 16 + 4) for label, video in named]
    return VideoStream(_rows(videos, height, below), videos[0].fps, videos[0].sound_SC)


def _rows(videos: Sequence[AnyVideo], height: int, below: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    widths = [_width_at(height, video) for video in videos]
    streams, now = [video.images for video in videos], [np.empty(0)] * len(videos)
    for _ in range(max(video.frames for video in videos)):
        now = [next(stream, last) for stream, last in zip(streams, now, strict=True)]
        row = _joined([resize(image, width, height, "stretch") for image, width in zip(now, widths, strict=True)])
        yield np.concatenate([row, _joined(below)]) if below else row


def contact_sheet(videos: Sequence[Video], labels: Sequence[str], columns: int = 8) -> np.ndarray:
    """Draw an image H W C with each clip's label above a row of `columns` frames, evenly spaced in time.

    Frames are 192 pixels high; clips with fewer frames than columns repeat some.
    """
    strips = []
    for video, label in zip(videos, labels, strict=True):
        chosen = np.linspace(0, video.frames - 1, columns).round().astype(int)
        width = _width_at(MIN_HEIGHT, video)
        strip = _joined([resize(video.frames_THWC[t], width, MIN_HEIGHT, "stretch") for t in chosen])
        strips += [_caption(label, strip.shape[1], size=16), strip]
    width = max(strip.shape[1] for strip in strips)
    return np.concatenate([_padded(strip, strip.shape[0], width) for strip in strips])


def _width_at(height: int, video: AnyVideo) -> int:
    """Return the width of an undistorted frame of this height."""
    return max(1, round(video.width * height / video.height))


def _joined(images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Join images H W C left to right with gaps, tops aligned."""
    height = max(image.shape[0] for image in images)
    spaced = [_padded(image, height, image.shape[1] + GAP) for image in images]
    return np.concatenate(spaced, axis=1)[:, :-GAP]


def _padded(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pad an image with white on the right and below."""
    more = ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0))
    return np.pad(image, more, constant_values=WHITE)


def _caption(text: str, width: int, size: int) -> np.ndarray:
    """Draw text, H W C, in at most three lines; longer text ends in "…"."""
    font = ImageFont.load_default(size)
    margin = size // 2
    characters = 0.95 * (width - 2 * margin) * len(text) / max(1, font.getlength(text.replace("\n", " ")))
    lines = textwrap.wrap(text, max(4, int(characters)), max_lines=3, placeholder="…")
    image = Image.new("RGB", (width, size * 4 * max(1, len(lines)) // 3 + size // 2), (WHITE,) * 3)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((margin, size // 4 + size * 4 * number // 3), line, fill="black", font=font)
    return np.asarray(image)
