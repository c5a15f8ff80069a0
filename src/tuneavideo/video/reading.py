"""From a file or folder to the chosen frames.

Frames are chosen by the clock: frame k is what is shown at the k-th tick of the clip's own rate, to the nearest half of
a tick. In a clip of constant rate these are the file's frames one by one; where the rate varies, long frames are taken
repeatedly and crowded ones left out, so that the clip plays at its true speed and in time with its sound.
"""

import errno
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count as counted
from pathlib import Path

import numpy as np
from av.error import FFmpegError
from PIL import Image

from tuneavideo.errors import VideoError
from tuneavideo.video.clip import Fit, Shelf, Spool, Video, fitted
from tuneavideo.video.sources import READABLE, Source, opened

SHORT = {errno.ENOMEM, errno.EAGAIN}  # the second: no room for the stack of a decoder's thread
MEMORY = 2**33  # bytes of the frames of a clip
BROKEN_PICTURE = (SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)  # of Pillow's decoders

Size = tuple[int, int] | Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which frames; see `read`."""

    start: int
    stride: int
    count: int | None
    start_time: float | None
    sample_fps: float | None

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
        size: Width and height that frames are fitted to, or a function from the clip's own to them; None leaves them.
        fit: How they are fitted to it, see `fitted`.
        fps: Frames a second of a source that does not say, such as a folder.

    Raises:
        VideoError: Nothing there, nothing readable, too few frames, or more than memory should hold.
    """
    choice = _Choice(start, stride, count, start_time, sample_fps)
    clip = _gathered(Path(path), choice, size, fit, fps, Shelf())
    assert isinstance(clip, Video), "a shelf without a folder is memory"
    return clip


def footage(
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
) -> Video | Spool:
    """Like `read`; frames of more than 64 MiB lie in a file without a name in `folder`."""
    choice = _Choice(start, stride, count, start_time, sample_fps)
    return _gathered(Path(path), choice, size, fit, fps, Shelf(folder, count))


def _gathered(path: Path, choice: _Choice, size: Size | None, fit: Fit, fps: float, shelf: Shelf) -> Video | Spool:
    _check_choice(path, choice)
    if not path.exists():
        raise VideoError(f"{path} does not exist; give {READABLE}")
    if path.is_file() and not path.stat().st_size:
        raise VideoError(f"{path} cannot be read as a video: it is empty (0 bytes); give {READABLE}")
    try:
        with opened(path, choice.begin, fps) as source:
            end = _choose(path, source, choice, size, fit, shelf)
            _check_length(path, shelf.count, end, source, choice)
            step = choice.step(source.fps)
            sound = source.sound(source.origin + choice.begin(source.fps), shelf.count * step)
        return shelf.clip(1 / step, sound)
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


def _choose(path: Path, source: Source, choice: _Choice, size: Size | None, fit: Fit, shelf: Shelf) -> float:
    """Put the chosen frames on the shelf, at their size; too few if the clip ends too soon, at the second returned."""
    shape, end = None, 0.0
    moments = choice.moments(source.fps)
    due = next(moments)
    for picture, end in source.timeline:
        image = None
        while due < end:
            if image is None:
                image = source.to_HWC(picture)
                shape = shape or image.shape
                _check_same_size(path, shape, image.shape)
                image = _at_size(image, size, fit)
            shelf.append(image)
            if len(shelf.frames) * image.nbytes > MEMORY:
                taken = f"{_frames(shelf.count)} of {image.shape[1]} x {image.shape[0]} take {MEMORY >> 30} GiB"
                raise VideoError(f"{path} is more than is held in memory: {taken}; take fewer frames, or smaller ones")
            due = next(moments, math.inf)
        if due == math.inf:
            break
    return end


def _at_size(image: np.ndarray, size: Size | None, fit: Fit) -> np.ndarray:
    if size is None:
        return image
    height, width = image.shape[:2]
    return fitted(image, *(size(width, height) if callable(size) else size), fit)


def _check_same_size(path: Path, first: tuple[int, ...], other: tuple[int, ...]) -> None:
    if first != other:
        sizes = f"{first[1]}x{first[0]}, {other[1]}x{other[0]}"
        raise VideoError(f"{path}: frames of one size are needed, found {sizes}; resize them")


def _check_length(path: Path, found: int, end: float, source: Source, choice: _Choice) -> None:
    """Refuse a clip that ends too soon, in the words in which the frames were chosen."""
    fps, count = source.fps, choice.count
    total = round(end * fps)
    cut = f", though it says it lasts {source.length:.3g} s" if source.length > end + 2 / fps else ""
    if total == 0:
        raise VideoError(f"{path} has no frames{cut}; give {READABLE}")
    in_seconds = choice.start_time is not None or choice.sample_fps is not None
    has = f"{path} has {_frames(total)}" + (f" in {end:.6g} s" if in_seconds else "") + cut
    place = f"{choice.start}" if choice.start_time is None else f"{choice.start_time:g} s"
    if found == 0:
        last = f"{total - 1}" if choice.start_time is None else f"{(total - 1) / fps:.6g} s"
        raise VideoError(f"{has}; none from {place}; start at {last} or before")
    if count is not None and found < count:
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
