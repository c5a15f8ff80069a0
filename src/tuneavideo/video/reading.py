"""Selection of a clip's frames by time.

Frame k is the image shown at time k / fps, to the nearest half of a frame. In a clip of constant rate these are the
frames of the file. Where the rate varies, long frames are repeated and short ones left out, so that speed and sound
stay right.
"""

import errno
import logging
import math
import struct
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count as counted
from pathlib import Path
from typing import Any, Literal

import numpy as np
from av.error import FFmpegError
from PIL import Image

from tuneavideo.errors import VideoError
from tuneavideo.video.clip import AnyVideo, Fit, FrameBuffer, Video, resize
from tuneavideo.video.sources import READABLE, SEEK_FROM, Extent, Source, measure, open_source

OUT_OF_MEMORY = {errno.ENOMEM, errno.EAGAIN}  # EAGAIN: no memory for the stack of a decoder's thread
SLOWEST = 4  # lowest frame rate that is chosen; it shows every step of a walk twice
MEMORY = 2**33  # most bytes of frames in memory
BROKEN_PICTURE = (
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)  # raised by Pillow's decoders

Size = tuple[int, int] | Callable[[int, int], tuple[int, int]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Span:
    """The frames to take of a clip; see `choose_span`.

    Attributes:
        stride: Distance in frames; None if `sample_fps` was given.
        count: Number of frames; None for all to the end.
        begin: Time of the first one, in seconds.
        step: Seconds from one to the next.
        total: Number of frames of the whole clip at its own rate, as far as known.
        seconds: Duration of the whole clip.
    """

    stride: int | None
    count: int | None
    begin: float
    step: float
    total: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Choice:
    """Arguments of `read` that select frames."""

    start: int
    stride: int
    count: int | None
    start_time: float | None
    sample_fps: float | None
    fewer: bool = False

    def begin(self, fps: float) -> float:
        """Return the time of the first chosen frame, in seconds."""
        return self.start / fps if self.start_time is None else self.start_time

    def step(self, fps: float) -> float:
        """Return the seconds from one chosen frame to the next."""
        return self.stride / fps if self.sample_fps is None else 1 / self.sample_fps

    def times(self, fps: float) -> Iterator[float]:
        """Yield the times to sample at: half a frame late, so that rounded timestamps do not matter."""
        numbers = counted() if self.count is None else range(self.count)
        return (self.begin(fps) + number * self.step(fps) + 0.5 / fps for number in numbers)

    def available(self, seconds: float, fps: float) -> int:
        """Return the number of frames to the end of a clip of this duration, whatever `count` is."""
        return max(0, math.ceil((seconds - self.begin(fps) - 0.5 / fps) / self.step(fps) - 1e-6))


def choose_span(
    path: str | Path,
    *,
    usual: int,
    count: int | Literal["all"] | None = None,
    start: int = 0,
    stride: int | None = None,
    start_time: float | None = None,
    sample_fps: float | None = None,
    fps: float = 8.0,
) -> Span:
    """Choose number and distance of the frames to take, without decoding the clip.

    If neither `stride` nor `sample_fps` is given, the frames are spread evenly to the end of the clip, at most a
    quarter of a second apart; with `count="all"` every frame is taken.

    Args:
        path: File or folder.
        usual: Number of frames if `count` is None; a shorter clip gives all it has.
        count: Exact number of frames, or "all" to the end.
        start, stride, start_time, sample_fps, fps: See `read`.

    Raises:
        VideoError: The clip cannot be read, or clearly has fewer frames than `count`.
    """
    path = Path(path)
    wanted = None if count == "all" else count or usual
    dense = _Choice(start, stride or 1, wanted, start_time, sample_fps)
    with _read_errors(path, dense):
        slowest = 1 / SLOWEST if stride is None else stride
        limit = math.inf if count or not wanted else wanted * max(slowest, dense.step(1.0)) + 1
        extent = measure(path, fps, limit + (start_time or start))
    seconds, rate = extent.seconds, extent.fps
    if stride is None and sample_fps is None:
        available = dense.available(seconds, rate)
        stride = max(1, min((available - 1) // (wanted - 1), int(rate / SLOWEST))) if wanted and wanted > 1 else 1
    choice = _Choice(start, stride or 1, wanted, start_time, sample_fps)
    found = choice.available(seconds, rate)
    # jumping timestamps make a clip look short; it is short only if its images are few, too
    if count and count != "all" and extent.pictures and choice.available(extent.pictures / rate, rate) < count:
        _check_length(path, found, extent, choice)
    if not count and found:
        wanted = min(usual, found)
    return Span(stride, wanted, choice.begin(rate), choice.step(rate), extent.total, extent.declared)


def read(
    path: str | Path,
    *,
    start: int = 0,
    stride: int = 1,
    count: int | None = None,
    start_time: float | None = None,
    sample_fps: float | None = None,
    size: Size | None = None,
    fit: Fit = "crop",
    fps: float = 8.0,
) -> Video:
    """Read frames and their sound from a video file, an animated image or a folder of images in natural order.

    Args:
        path: File or folder.
        start: First frame, counted from 0.
        stride: Distance between frames.
        count: Number of frames; None for all to the end.
        start_time: Time of the first frame in seconds, instead of `start`.
        sample_fps: Frames to take per second, instead of `stride`.
        size: Width and height of the result, or a function from the clip's own to them; None keeps the size.
        fit: Method of resizing, see `resize`.
        fps: Frame rate of a source that has none, such as a folder.

    Raises:
        VideoError: The clip cannot be read, has too few frames, or needs more than 8 GiB.
    """
    choice = _Choice(start, stride, count, start_time, sample_fps)
    clip = _gathered(Path(path), choice, size, fit, fps, FrameBuffer())
    assert isinstance(clip, Video), "a buffer without a folder is in memory"
    return clip


def read_any(
    path: str | Path,
    folder: Path,
    *,
    start: int = 0,
    stride: int = 1,
    count: int | None = None,
    start_time: float | None = None,
    sample_fps: float | None = None,
    size: Size | None = None,
    fit: Fit = "crop",
    fps: float = 8.0,
    fewer: bool = False,
) -> AnyVideo:
    """Like `read`, but more than 64 MiB of frames are kept in an unnamed temporary file in `folder`.

    With `fewer`, a clip that is too short or damaged gives the frames it has; damage is a warning.
    """
    choice = _Choice(start, stride, count, start_time, sample_fps, fewer)
    return _gathered(Path(path), choice, size, fit, fps, FrameBuffer(folder))


def _gathered(path: Path, choice: _Choice, size: Size | None, fit: Fit, fps: float, buffer: FrameBuffer) -> AnyVideo:
    with _read_errors(path, choice), open_source(path, choice.begin, fps) as source:
        end, pictures = _choose(path, source, choice, size, fit, buffer)
        if choice.begin(source.fps) > SEEK_FROM:
            pictures = 0  # some were skipped
        _check_length(path, buffer.count, Extent(end, source.fps, pictures, source.length), choice)
        step = choice.step(source.fps)
        sound = source.sound(source.origin + choice.begin(source.fps), buffer.count * step)
        return buffer.clip(1 / step, sound)


@contextmanager
def _read_errors(path: Path, choice: _Choice) -> Generator[None, None, None]:
    """Refuse invalid choices and missing files; convert errors of the libraries to VideoError."""
    _check_choice(path, choice)
    if not path.exists():
        raise VideoError(f"{path} does not exist; give {READABLE}")
    if path.is_file() and not path.stat().st_size:
        raise VideoError(f"{path} cannot be read as a video: it is empty (0 bytes); give {READABLE}")
    try:
        yield
    except (FFmpegError, OSError, MemoryError, *BROKEN_PICTURE) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in OUT_OF_MEMORY:
            raise VideoError(f"{path}: not enough memory to read it; take fewer frames, or smaller ones") from error
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{path} cannot be read as a video: {reason}; give {READABLE}") from error


def _check_choice(path: Path, choice: _Choice) -> None:
    if choice.start < 0 or choice.stride < 1 or (choice.count is not None and choice.count < 1):
        found = f"start {choice.start}, stride {choice.stride}, count {choice.count}"
        raise VideoError(f"{path}: found {found}; start at 0 or later, take every 1 or more, at least 1 frame")
    if (choice.start_time or 0) < 0 or (choice.sample_fps is not None and choice.sample_fps <= 0):
        found = f"start_time {choice.start_time}, sample_fps {choice.sample_fps}"
        raise VideoError(f"{path}: found {found}; start at 0 s or later, take more than 0 frames a second")
    if (choice.start and choice.start_time is not None) or (choice.stride > 1 and choice.sample_fps):
        raise VideoError(f"{path}: give start or start_time, stride or sample_fps, not both")


def _choose(
    path: Path, source: Source, choice: _Choice, size: Size | None, fit: Fit, buffer: FrameBuffer
) -> tuple[float, int]:
    """Append the chosen frames to the buffer; fewer if the clip ends too soon.

    Returns:
        The end of the last image that was decoded, in seconds, and the number of images up to it.
    """
    shape, first, end, pictures = None, path, 0.0, 0
    times = choice.times(source.fps)
    time = next(times)
    for picture, end in _undamaged(source.timeline, choice, buffer):
        image, pictures = None, pictures + 1
        while time < end:
            if image is None:
                image = source.to_HWC(picture)
                if shape is None:
                    shape, first = image.shape, picture
                _check_same_size(path, (first, shape), (picture, image.shape))
                image = _at_size(image, size, fit)
            buffer.append(image)
            if not buffer.folder and buffer.nbytes > MEMORY:
                taken = f"{_frames(buffer.count)} of {image.shape[1]} x {image.shape[0]} take {MEMORY >> 30} GiB"
                raise VideoError(f"{path} is more than is held in memory: {taken}; take fewer frames, or smaller ones")
            time = next(times, math.inf)
        if time == math.inf:
            break
    return end, pictures


def _undamaged(
    timeline: Iterator[tuple[Any, float]], choice: _Choice, buffer: FrameBuffer
) -> Iterator[tuple[Any, float]]:
    """Yield a timeline; end it at damage if the choice allows fewer frames."""
    try:
        yield from timeline
    except VideoError as error:
        if not (choice.fewer and buffer.count):
            raise
        logger.warning("%s; the %s before that are taken", error, _frames(buffer.count))


def _at_size(image: np.ndarray, size: Size | None, fit: Fit) -> np.ndarray:
    if size is None:
        return image
    height, width = image.shape[:2]
    return resize(image, *(size(width, height) if callable(size) else size), fit)


def _check_same_size(path: Path, first: tuple[Any, tuple[int, ...]], other: tuple[Any, tuple[int, ...]]) -> None:
    if first[1] != other[1]:
        sizes = ", ".join(
            f"{shape[1]}x{shape[0]}" + (f" ({picture.name})" if isinstance(picture, Path) else "")
            for picture, shape in (first, other)
        )
        raise VideoError(f"{path}: frames of one size are needed, found {sizes}; resize them")


def _check_length(path: Path, found: int, extent: Extent, choice: _Choice) -> None:
    """Raise VideoError for a clip that ends too soon, in the terms in which the frames were chosen."""
    end, fps, count = extent.seconds, extent.fps, choice.count
    total = round(end * fps)
    cut = f", though it says it lasts {extent.declared:.3g} s" if extent.declared > end + 2 / fps else ""
    if total == 0:
        raise VideoError(f"{path} has no frames{cut}; give {READABLE}")
    in_seconds = choice.start_time is not None or choice.sample_fps is not None
    has = f"{path} has {_frames(total)}" + (f" in {end:.6g} s" if in_seconds else "")
    if extent.pictures and abs(extent.pictures - total) > 2 + total / 100:
        has += f" at a steady {fps:.4g} a second ({extent.pictures} of varying length in the file)"
    has += cut
    place = f"{choice.start}" if choice.start_time is None else f"{choice.start_time:g} s"
    if found == 0:
        last = f"{total - 1}" if choice.start_time is None else f"{(total - 1) / fps:.6g} s"
        raise VideoError(f"{has}; none from {place}; start at {last} or before")
    if count is not None and found < count and not choice.fewer:
        need, instead = f"{choice.start + (count - 1) * choice.stride + 1}", ""
        if in_seconds:
            need = f"{choice.begin(fps) + (count - 1) * choice.step(fps) + 1 / fps:.6g} s"
        elif closest := (total - 1 - choice.start) // (count - 1):
            instead = f", or every {closest}"
        pace = f"every {choice.stride}" if choice.sample_fps is None else f"{choice.sample_fps:g} a second"
        raise VideoError(f"{has}; {_frames(count)}, {pace} from {place}, need {need}; take {_frames(found)}{instead}")


def _frames(number: int) -> str:
    return f"{number} frame" if number == 1 else f"{number} frames"
