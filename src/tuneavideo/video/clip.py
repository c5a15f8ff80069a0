"""Clips in memory, on disk and as a stream; resizing of images. Does not import PyAV."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO, Literal, get_args

import numpy as np
from PIL import Image

Fit = Literal["crop", "pad", "stretch"]

IN_MEMORY = 2**26  # bytes of frames; `FrameBuffer` writes longer clips to disk


@dataclass(frozen=True, slots=True, repr=False)
class Video:
    """A clip in memory.

    Attributes:
        frames_THWC: Frames, uint8 RGB in 0..255.
        fps: Frames per second.
        sound_SC: Sound as long as the frames, int16, 48,000 samples a second, 2 channels; None for a silent clip.
    """

    frames_THWC: np.ndarray
    fps: float
    sound_SC: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape, dtype = self.frames_THWC.shape, self.frames_THWC.dtype
        assert len(shape) == 4 and shape[3] == 3 and 0 not in shape, f"expected T H W 3, found {shape}"
        assert dtype == np.uint8, f"expected uint8 in 0..255, found {dtype}"
        assert 0 < self.fps < math.inf, f"expected frames a second, found {self.fps}"

    def __repr__(self) -> str:
        sound = "no sound" if self.sound_SC is None else "with sound"
        size = f"{self.frames} frames of {self.width} x {self.height}"
        return f"Video({size}, {self.fps:g} frames per second, {sound})"

    @property
    def frames(self) -> int:
        return self.frames_THWC.shape[0]

    @property
    def height(self) -> int:
        return self.frames_THWC.shape[1]

    @property
    def width(self) -> int:
        return self.frames_THWC.shape[2]

    @property
    def images(self) -> Iterator[np.ndarray]:
        return iter(self.frames_THWC)


@dataclass(frozen=True, slots=True)
class VideoStream:
    """A clip as an iterator: `images` (H W C, of one size, at least one) can be read once; see `Video` for the rest."""

    images: Iterator[np.ndarray]
    fps: float
    sound_SC: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class DiskVideo:
    """A long clip on disk, with one frame in memory at a time; see `Video`.

    `file` is an unnamed temporary file with the bytes of all frames. It is deleted with the object.
    """

    file: IO[bytes]
    shape_THWC: tuple[int, int, int, int]
    fps: float
    sound_SC: np.ndarray | None = None

    @property
    def frames(self) -> int:
        return self.shape_THWC[0]

    @property
    def height(self) -> int:
        return self.shape_THWC[1]

    @property
    def width(self) -> int:
        return self.shape_THWC[2]

    @property
    def images(self) -> Iterator[np.ndarray]:
        size = math.prod(self.shape_THWC[1:])
        for number in range(self.frames):
            self.file.seek(number * size)  # another iterator may have moved it
            yield np.frombuffer(self.file.read(size), np.uint8).reshape(self.shape_THWC[1:])


AnyVideo = Video | DiskVideo


class FrameBuffer:
    """Buffer of a clip's frames: in memory, or above 64 MiB in a temporary file in `folder`, if there is one."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.count, self.nbytes = folder, 0, 0
        limit, place = (IN_MEMORY, str(folder)) if folder else (0, None)  # 0: always in memory
        self.file = SpooledTemporaryFile(limit, dir=place)  # noqa: SIM115 - closed with the clip

    def append(self, image_HWC: np.ndarray) -> None:
        self.count, self.nbytes, self.shape = self.count + 1, self.nbytes + image_HWC.nbytes, image_HWC.shape
        self.file.write(np.ascontiguousarray(image_HWC).data)

    def clip(self, fps: float, sound_SC: np.ndarray | None = None) -> AnyVideo:
        if self.folder and self.nbytes > IN_MEMORY:
            return DiskVideo(self.file, (self.count, *self.shape), fps, sound_SC)
        frames_THWC = np.empty((self.count, *self.shape), np.uint8)
        self.file.seek(0)
        self.file.readinto(frames_THWC.data)
        return Video(frames_THWC, fps, sound_SC)


def collect(images: Iterable[np.ndarray], fps: float, folder: Path) -> AnyVideo:
    """Collect the images of an iterator in a clip; a long one is written to a file in `folder`."""
    buffer = FrameBuffer(folder)
    for image_HWC in images:
        buffer.append(image_HWC)
    return buffer.clip(fps)


def resize(image_HWC: np.ndarray, width: int, height: int, how: Fit = "crop") -> np.ndarray:
    """Resize an image to `width` x `height` pixels (Lanczos).

    Args:
        image_HWC: The image, uint8.
        width: New width.
        height: New height.
        how: "crop" keeps the middle and "pad" adds black bars, both without distortion; "stretch" distorts.
    """
    assert how in get_args(Fit), f"expected one of {get_args(Fit)}, found {how!r}"
    image, size = Image.fromarray(image_HWC), (width, height)
    if how == "crop":
        image = image.resize(size, Image.Resampling.LANCZOS, _middle(image.width, image.height, width / height))
    elif how == "pad":
        scale = min(width / image.width, height / image.height)
        inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        sheet = Image.new("RGB", size, "black")
        sheet.paste(image.resize(inner, Image.Resampling.LANCZOS), ((width - inner[0]) // 2, (height - inner[1]) // 2))
        image = sheet
    else:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image)


def _middle(width: int, height: int, aspect: float) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the largest centred box whose width is `aspect` times its height."""
    inner_width, inner_height = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - inner_width) / 2, (height - inner_height) / 2
    return left, top, left + inner_width, top + inner_height


def area_size(width: int, height: int, *, area: float, multiple: int) -> tuple[int, int]:
    """Compute width and height of about `area` pixels with the aspect ratio of `width` x `height`.

    Each side is rounded to the multiple of `multiple` that is nearest in ratio, which minimises the sum of the errors
    in aspect and area.
    """
    aspect = width / height
    return _nearest(math.sqrt(area * aspect), multiple), _nearest(math.sqrt(area / aspect), multiple)


def _nearest(side: float, multiple: int) -> int:
    """Return the positive multiple nearest to `side` in ratio."""
    units = side / multiple
    below = max(1, math.floor(units))
    return multiple * (below if units**2 <= below * (below + 1) else below + 1)
