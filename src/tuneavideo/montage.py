"""Clips side by side, and many clips on one sheet, with their captions."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tuneavideo.video import Video

LEGIBLE = 192  # rows a column needs before a caption below it can be read
GAP = 8  # pixels of paper between clips
PAPER = 255


def side_by_side(videos: Sequence[Video], *, labels: Sequence[str] | None = None) -> Video:
    """Clips left to right at the height of the tallest, each above its label, at the rate of the first.

    A clip that ends early holds its last frame. Clips of less than 192 rows are enlarged a whole number of
    times, so that labels can be read.
    """
    tallest = max(video.height for video in videos)
    height = tallest * math.ceil(LEGIBLE / tallest)
    columns = [video.at_height(height) for video in videos]
    size = height // 16 + 4
    named = [] if labels is None else zip(labels, columns, strict=True)
    below = [_caption(label, clip.width, size) for label, clip in named]
    frames = []
    for t in range(max(clip.frames for clip in columns)):
        row = _beside([clip.frames_THWC[min(t, clip.frames - 1)] for clip in columns])
        frames.append(np.concatenate([row, _beside(below)]) if below else row)
    return Video(np.stack(frames), videos[0].fps)


def contact_sheet(videos: Sequence[Video], labels: Sequence[str], columns: int = 8) -> np.ndarray:
    """One picture, H W C: for each clip its label above a row of `columns` frames, evenly spaced in time.

    Frames are 192 rows high; clips with fewer frames than columns repeat some.
    """
    strips = []
    for video, label in zip(videos, labels, strict=True):
        chosen = np.linspace(0, video.frames - 1, columns).round().astype(int)
        strip = _beside(Video(video.frames_THWC[chosen], video.fps).at_height(LEGIBLE).frames_THWC)
        strips += [_caption(label, strip.shape[1], size=16), strip]
    width = max(strip.shape[1] for strip in strips)
    return np.concatenate([_papered(strip, strip.shape[0], width) for strip in strips])


def _beside(images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Pictures H W C left to right, tops aligned, paper between them."""
    height = max(image.shape[0] for image in images)
    spaced = [_papered(image, height, image.shape[1] + GAP) for image in images]
    return np.concatenate(spaced, axis=1)[:, :-GAP]


def _papered(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture in the top left corner of a sheet of paper."""
    more = ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0))
    return np.pad(image, more, constant_values=PAPER)


def _caption(text: str, width: int, size: int) -> np.ndarray:
    """A band of text, H W C, in at most three lines; what is longer ends in "…"."""
    font = ImageFont.load_default(size)
    characters = 0.95 * width * len(text) / max(1, font.getlength(text.replace("\n", " ")))
    lines = textwrap.wrap(text, max(4, int(characters)), max_lines=3, placeholder="…")
    image = Image.new("RGB", (width, size * 4 * max(1, len(lines)) // 3 + size // 2), (PAPER,) * 3)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((0, size // 4 + size * 4 * number // 3), line, fill="black", font=font)
    return np.asarray(image)
