"""The three forms of a clip, and how pictures are brought to a size. No PyAV here."""

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

import numpy as np
from PIL import Image

Fit = Literal["crop", "pad", "stretch"]

IN_MEMORY = 2**26  # bytes of frames; a `FrameBuffer` lays longer clips on the disk


@dataclass(frozen=True, slots=True, repr=False)
class Video:
    """A clip in memory: `frames_THWC` (uint8, RGB, 0..255), how many of them make a second, and what is heard.

    `sound_SC` (int16, 48,000 samples a second, 2 channels) lasts as long as the frames; None where there is none.
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
    """A clip on its way: what `Video` holds, its `images` (H W C, of one size, at least one) one at a time and once."""

    images: Iterator[np.ndarray]
    fps: float
    sound_SC: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class DiskVideo:
    """A long clip on the disk: what `Video` holds, one frame in memory at a time.

    Its frames lie one after the other in `file`, which has no name and is gone when the clip is.
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
            self.file.seek(number * size)  # others may read it too
            yield np.frombuffer(self.file.read(size), np.uint8).reshape(self.shape_THWC[1:])


AnyVideo = Video | DiskVideo


class FrameBuffer:
    """Gathers the frames of a clip: in memory, or in a file in `folder`, if there is one, and they take over 64 MiB.

    If it is known how many are `expected`, a long clip is in the file from its first frame on.
    """

    def __init__(self, folder: Path | None = None, expected: int | None = None) -> None:
        self.folder, self.expected, self.frames, self.count = folder, expected or 0, [], 0
        self.file: IO[bytes] | None = None

    def append(self, image_HWC: np.ndarray) -> None:
        self.count, self.shape = self.count + 1, image_HWC.shape
        self.frames.append(image_HWC)
        if self.folder and not self.file and max(self.count, self.expected) * image_HWC.nbytes > IN_MEMORY:
            self.file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - it outlives this
        if self.file:
            for image in self.frames:
                self.file.write(np.ascontiguousarray(image).data)
            self.frames.clear()

    def clip(self, fps: float, sound_SC: np.ndarray | None = None) -> AnyVideo:
        if self.file:
            return DiskVideo(self.file, (self.count, *self.shape), fps, sound_SC)
        return Video(np.stack(self.frames), fps, sound_SC)


def collect(images: Iterable[np.ndarray], frames: int, fps: float, folder: Path) -> AnyVideo:
    """A clip of so many frames as they come; a long one lies in a file in `folder`."""
    buffer = FrameBuffer(folder, frames)
    for image_HWC in images:
        buffer.append(image_HWC)
    return buffer.clip(fps)


def resize(image_HWC: np.ndarray, width: int, height: int, how: Fit = "crop") -> np.ndarray:
    """A picture at another size in pixels.

    Undistorted it is its middle ("crop"), or all of it between black bars ("pad"); "stretch" is all of it, distorted.
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
    """Left, top, right, bottom of the largest centred box whose width is `aspect` times its height."""
    inner_width, inner_height = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - inner_width) / 2, (height - inner_height) / 2
    return left, top, left + inner_width, top + inner_height


def area_size(width: int, height: int, *, area: float, multiple: int) -> tuple[int, int]:
    """Width and height, multiples of `multiple`, of about `area` pixels, shaped like `width` x `height`.

    Each side goes to the multiple nearest in ratio: so the sum of the errors in aspect and area is least.
    """
    aspect = width / height
    return _nearest(math.sqrt(area * aspect), multiple), _nearest(math.sqrt(area / aspect), multiple)


def _nearest(side: float, multiple: int) -> int:
    """The multiple, at least one, nearest to `side` in ratio."""
    units = side / multiple
    below = max(1, math.floor(units))
    return multiple * (below if units**2 <= below * (below + 1) else below + 1)
