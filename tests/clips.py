"""Clips of every kind for tests, made by PyAV and Pillow without the code under test.

Frame n shows its number: eight columns, white above black for a bit that is set, black above white for one that is not.
Turned, mirrored or shifted it reads as another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Colorspace
from PIL import Image

PQ, HLG = 16, 18  # FFmpeg's numbers of the transfer curves
CLAPS = (0.48, 1.44, 2.4, 3.36)  # seconds at which a flash and a click begin


def barcode(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    """Draw a picture H W 3 that shows a number up to 255."""
    image = np.zeros((height, width, 3), np.uint8)
    for bit in range(8):
        rows = slice(0, height // 2) if number >> bit & 1 else slice(height // 2, height)
        image[rows, width * bit // 8 : width * (bit + 1) // 8] = 255
    return image


def barcodes(count: int, width: int = 96, height: int = 64) -> list[np.ndarray]:
    return [barcode(number, width, height) for number in range(count)]


def number_of(image: np.ndarray) -> int:
    """Read the number that a picture shows, at any size."""
    grey = image.astype(float).mean(axis=-1)
    height, width = grey.shape
    number = 0
    for bit in range(8):
        column = grey[:, int(width * (bit + 0.25) / 8) : max(int(width * (bit + 0.75) / 8), 1 + width * bit // 8)]
        upper, lower = (
            column[height // 8 : height * 3 // 8 or 1].mean(),
            column[height * 5 // 8 : height * 7 // 8].mean(),
        )
        assert abs(upper - lower) > 100, f"bit {bit} is ambiguous: {upper:.0f} above {lower:.0f}"
        number |= int(upper > lower) << bit
    return number


def numbers(video) -> list[int]:
    return [number_of(frame) for frame in video.frames_THWC]


def see_through(image: np.ndarray) -> np.ndarray:
    """The same picture over white: what is white becomes transparent black, H W 4."""
    return np.dstack([np.zeros_like(image), 255 - image[..., 0]])


def encode(
    path: Path,
    images: Sequence[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: Fraction | int = 10,
    *,
    times: Sequence[float] | None = None,
    matrix: Sequence[int] = (),
    pixel_aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
    curve: int = 0,
    sound: tuple[str, np.ndarray, int] | None = None,
    file_options: dict[str, str] | None = None,
) -> Path:
    """Encode pictures (RGB, or RGBA), each shown for a tick or from its time (seconds) on.

    Args:
        matrix: a, b, c, d of the display matrix: a pixel at x, y is shown at ax + cy, bx + dy.
        curve: Of HDR, PQ or HLG; then the pictures are in BT.2020.
        sound: Codec, samples `S C` (float, -1..1) and how many make a second.
    """
    with av.open(str(path), "w", options=file_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], pix_fmt
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if matrix:
            a, b, c, d = (16384 * 4 * value for value in matrix)
            stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 2**30])
        if pixel_aspect:
            stream.sample_aspect_ratio = pixel_aspect
        if curve:
            stream.color_trc, stream.color_primaries, stream.colorspace, stream.color_range = curve, 9, 9, 1
        track = container.add_stream(sound[0], rate=sound[2]) if sound else None
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgba" if image.shape[2] == 4 else "rgb24")
            if curve:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=Colorspace.BT2020)
                frame.color_trc, frame.color_primaries = curve, 9
            if times:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if track and sound:
            samples = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(sound[1].T, np.float32),
                format="fltp",
                layout=("mono", "stereo")[sound[1].shape[1] - 1],
            )
            samples.sample_rate, samples.pts = sound[2], 0
            container.mux(track.encode(samples))
            container.mux(track.encode(None))
    return path


def clapped(path: Path, video_codec: str, sound_codec: str, rate: int, channels: int = 1) -> Path:
    """Four seconds at 25 frames a second with four claps."""
    frames, samples = np.arange(100) / 25, np.arange(4 * rate) / rate
    lit = [any(clap - 1e-6 <= time < clap + 0.16 for clap in CLAPS) for time in frames]
    images = [np.full((48, 64, 3), 255 * on, np.uint8) for on in lit]
    track = sum((samples >= clap) * (samples < clap + 0.02) * np.sin(2000 * np.pi * (samples - clap)) for clap in CLAPS)
    sound = np.repeat(0.8 * np.asarray(track)[:, None], channels, axis=1)
    return encode(path, images, video_codec, rate=25, sound=(sound_codec, sound, rate))


def animate(path: Path, images: Sequence[np.ndarray], milliseconds: int | list[int] = 100, **options) -> Path:
    """A GIF or WebP."""
    first, *others = map(Image.fromarray, images)
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0, **options)
    return path
