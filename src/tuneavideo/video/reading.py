"""From a file or folder to the chosen frames.

Frames are chosen by the clock: frame k is what is shown at the k-th tick of the clip's own rate, to the nearest half of
a tick. In a clip of constant rate these are the file's frames one by one; where the rate varies, long frames are taken
repeatedly and crowded ones left out, so that the clip plays at its true speed and in time with its sound.
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
from tuneavideo.video.sources import READABLE, SOUGHT, Extent, Source, measure, open_source

SHORT = {errno.ENOMEM, errno.EAGAIN}  # the second: no room for the stack of a decoder's thread
SLOWEST = 4  # frames a second, below which frames are not spread: of a walk, two steps a second, each is seen twice
MEMORY = 2**33  # bytes of the frames of a clip
BROKEN_PICTURE = (SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # of Pillow's decoders

Size = tuple[int, int] | Callable[[int, int], tuple[int, int]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Span:
    """Which frames of a clip to take; see `choose_span`.

    Attributes:
        stride: Every so many frames; None if `sample_fps` was given.
        count: How many; None for all to the end.
        begin: Second of the clip at which the first is shown.
        step: Seconds from one to the next.
        total: Frames of the whole clip at its own rate, as far as the file says.
        seconds: Those of the whole clip.
    """

    stride: int | None
    count: int | None
    begin: float
    step: float
    total: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which frames; see `read`."""

    start: int
    stride: int
    count: int | None
    start_time: float | None
    sample_fps: float | None
    fewer: bool = False

    def begin(self, fps: float) -> float:
        """Seconds from the beginning of the clip to that of the first frame chosen."""
        return self.start / fps if self.start_time is None else self.start_time

    def step(self, fps: float) -> float:
        """Seconds from one chosen frame to the next."""
        return self.stride / fps if self.sample_fps is None else 1 / self.sample_fps

    def moments(self, fps: float) -> Iterator[float]:
        """Seconds at which to look: half a tick late, so that rounded timestamps do not matter."""
        numbers = counted() if self.count is None else range(self.count)
        return (self.begin(fps) + number * self.step(fps) + 0.5 / fps for number in numbers)

    def available(self, seconds: float, fps: float) -> int:
        """How many there are to the end of a clip of so many seconds, if `count` does not end them."""
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
    """Choose what is left open of the frames to take, without decoding the clip.

    Where neither `stride` nor `sample_fps` is given, the frames are spread to the end of the clip, but no further apart
    than a quarter of a second; all frames are taken one after the other.

    Args:
        path: The file or folder.
        usual: How many to take if there are so many, and all if not, where no `count` is given.
        count: How many to take at all events, or "all" to the end.
        start, stride, start_time, sample_fps, fps: See `read`.

    Raises:
        VideoError: Nothing there, nothing readable, or clearly fewer frames than `count`.
    """
    path = Path(path)
    wanted = None if count == "all" else count or usual
    open_ended = _Choice(start, stride or 1, wanted, start_time, sample_fps)
    with _one_line(path, open_ended):
        slowest = 1 / SLOWEST if stride is None else stride
        enough = math.inf if count or not wanted else wanted * max(slowest, open_ended.step(1.0)) + 1
        extent = measure(path, fps, enough + (start_time or start))
    seconds, rate = extent.seconds, extent.fps
    if stride is None and sample_fps is None:
        there = open_ended.available(seconds, rate)
        stride = max(1, min((there - 1) // (wanted - 1), int(rate / SLOWEST))) if wanted and wanted > 1 else 1
    choice = _Choice(start, stride or 1, wanted, start_time, sample_fps)
    found = choice.available(seconds, rate)
    # timestamps that jump make a file look short: it is, only if its pictures are few as well
    if count and count != "all" and extent.pictures and choice.available(extent.pictures / rate, rate) < count:
        _check_length(path, found, extent, choice)
    if not count and found:
        wanted = min(usual, found)
    return Span(stride, wanted, choice.begin(rate), choice.step(rate), extent.total, extent.said)


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
    """Chosen frames of a video file, a moving picture or a folder of pictures in natural order, and their sound.

    Frames are decoded one after another from shortly before the first to the last; only the chosen ones are kept.

    Args:
        path: The file or folder.
        start: First frame, counted from 0.
        stride: Take every so many frames.
        count: How many to take; None takes all to the end.
        start_time: Second to start at, instead of `start`.
        sample_fps: Frames to take of every second, instead of `stride`.
        size: Width and height that frames are resized to, or a function from the clip's own to them; None leaves them.
        fit: How they are brought to it, see `resize`.
        fps: Frames a second of a source that does not say, such as a folder.

    Raises:
        VideoError: Nothing there, nothing readable, too few frames, or more than memory should hold.
    """
    choice = _Choice(start, stride, count, start_time, sample_fps)
    clip = _gathered(Path(path), choice, size, fit, fps, FrameBuffer())
    assert isinstance(clip, Video), "a buffer without a folder is memory"
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
    """Like `read`; frames of more than 64 MiB lie in a file without a name in `folder`.

    With `fewer`, a clip that is shorter or damaged on the way gives the frames it has, and damage is a warning.
    """
    choice = _Choice(start, stride, count, start_time, sample_fps, fewer)
    return _gathered(Path(path), choice, size, fit, fps, FrameBuffer(folder, count))


def _gathered(path: Path, choice: _Choice, size: Size | None, fit: Fit, fps: float, buffer: FrameBuffer) -> AnyVideo:
    with _one_line(path, choice), open_source(path, choice.begin, fps) as source:
        end, pictures = _choose(path, source, choice, size, fit, buffer)
        if choice.begin(source.fps) > SOUGHT:
            pictures = 0  # not all of them were seen
        _check_length(path, buffer.count, Extent(end, source.fps, pictures, source.length), choice)
        step = choice.step(source.fps)
        sound = source.sound(source.origin + choice.begin(source.fps), buffer.count * step)
        return buffer.clip(1 / step, sound)


@contextmanager
def _one_line(path: Path, choice: _Choice) -> Generator[None, None, None]:
    """Refuse a choice that means nothing and a clip that is not there; turn what libraries say of it into one line."""
    _check_choice(path, choice)
    if not path.exists():
        raise VideoError(f"{path} does not exist; give {READABLE}")
    if path.is_file() and not path.stat().st_size:
        raise VideoError(f"{path} cannot be read as a video: it is empty (0 bytes); give {READABLE}")
    try:
        yield
    except (FFmpegError, OSError, MemoryError, *BROKEN_PICTURE) as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in SHORT:
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
    """Put the chosen frames on the buffer, at their size; too few if the clip ends too soon.

    Returns the second at which the last picture that was looked at goes, and the number of pictures up to it.
    """
    shape, first, end, pictures = None, path, 0.0, 0
    moments = choice.moments(source.fps)
    due = next(moments)
    for picture, end in _whole(source.timeline, choice, buffer):
        image, pictures = None, pictures + 1
        while due < end:
            if image is None:
                image = source.to_HWC(picture)
                if shape is None:
                    shape, first = image.shape, picture
                _check_same_size(path, (first, shape), (picture, image.shape))
                image = _at_size(image, size, fit)
            buffer.append(image)
            if len(buffer.frames) * image.nbytes > MEMORY:
                taken = f"{_frames(buffer.count)} of {image.shape[1]} x {image.shape[0]} take {MEMORY >> 30} GiB"
                raise VideoError(f"{path} is more than is held in memory: {taken}; take fewer frames, or smaller ones")
            due = next(moments, math.inf)
        if due == math.inf:
            break
    return end, pictures


def _whole(timeline: Iterator[tuple[Any, float]], choice: _Choice, buffer: FrameBuffer) -> Iterator[tuple[Any, float]]:
    """A timeline; if fewer frames will do, up to the damage in it."""
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
    """Refuse a clip that ends too soon, in the words in which the frames were chosen."""
    end, fps, count = extent.seconds, extent.fps, choice.count
    total = round(end * fps)
    cut = f", though it says it lasts {extent.said:.3g} s" if extent.said > end + 2 / fps else ""
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
        begin, step = choice.begin(fps), choice.step(fps)
        if in_seconds:
            need, ways = f"{begin + (count - 1) * step + 1 / fps:.6g} s", ""
        else:
            need, closest = (
                f"{choice.start + (count - 1) * choice.stride + 1}",
                (total - 1 - choice.start) // (count - 1),
            )
            ways = f", or every {closest}" if closest else ""
        pace = f"every {choice.stride}" if choice.sample_fps is None else f"{choice.sample_fps:g} a second"
        raise VideoError(f"{has}; {_frames(count)}, {pace} from {place}, need {need}; take {_frames(found)}{ways}")


def _frames(number: int) -> str:
    return f"{number} frame" if number == 1 else f"{number} frames"
