"""Clips: read, sample, fit, write. The only file that knows PyAV.

Axes: T frames, H rows, W columns, C = 3 channels (red, green, blue); pixels are uint8, 0..255.
"""

import math
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from uuid import uuid4

import av
import av.filter
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image, ImageOps, ImageSequence

from tuneavideo.errors import VideoError

Fit = Literal["crop", "stretch"]
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
READABLE = "mp4, mov, webm, mkv, avi, gif, webp or a folder of pictures"
FASTEST_GIF = 50  # frames a second: browsers slow down what claims to be faster


@dataclass(frozen=True, slots=True)
class Video:
    """A clip: `frames_THWC` (uint8, RGB, 0..255) and how many of them make a second."""

    frames_THWC: np.ndarray
    fps: float

    def __post_init__(self) -> None:
        shape, dtype = self.frames_THWC.shape, self.frames_THWC.dtype
        assert len(shape) == 4 and shape[3] == 3 and 0 not in shape, f"expected T H W 3, found {shape}"
        assert dtype == np.uint8, f"expected uint8 in 0..255, found {dtype}"
        assert 0 < self.fps < math.inf, f"expected frames a second, found {self.fps}"

    @property
    def frames(self) -> int:
        return self.frames_THWC.shape[0]

    @property
    def height(self) -> int:
        return self.frames_THWC.shape[1]

    @property
    def width(self) -> int:
        return self.frames_THWC.shape[2]

    def fit(self, width: int, height: int, how: Fit = "crop") -> "Video":
        """The clip at another size in pixels: its middle, undistorted ("crop"), or all of it ("stretch")."""
        assert how in get_args(Fit), f"expected one of {get_args(Fit)}, found {how!r}"
        box = self._middle(width / height) if how == "crop" else (0, 0, self.width, self.height)
        images = map(Image.fromarray, self.frames_THWC)
        resized = [image.resize((width, height), Image.Resampling.LANCZOS, box) for image in images]
        return Video(np.stack([np.asarray(image) for image in resized]), self.fps)

    def _middle(self, aspect: float) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the largest centred box whose width is `aspect` times its height."""
        width, height = min(self.width, self.height * aspect), min(self.height, self.width / aspect)
        left, top = (self.width - width) / 2, (self.height - height) / 2
        return left, top, left + width, top + height

    def at_height(self, height: int) -> "Video":
        """The whole clip, undistorted, at another height in pixels."""
        return self.fit(max(1, round(self.width * height / self.height)), height, "stretch")


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


# Reading


class _Source(NamedTuple):
    """Pictures one after another, how to make pixels of one, and how many make a second."""

    pictures: Iterable[Any]
    to_HWC: Callable[[Any], np.ndarray]
    fps: float


def read(path: str | Path, *, start: int = 0, stride: int = 1, count: int | None = None, fps: float = 8.0) -> Video:
    """Frames `start + i * stride` of a video file, a moving picture or a folder of pictures in natural order.

    Args:
        path: The file or folder.
        start: First frame, counted from 0.
        stride: Take every so many frames.
        count: How many to take; None takes all to the end.
        fps: Frames a second of a source that does not say, such as a folder.

    Raises:
        VideoError: Nothing there, nothing readable, or too few frames.
    """
    path = Path(path)
    if start < 0 or stride < 1 or (count is not None and count < 1):
        found = f"start {start}, stride {stride}, count {count}"
        raise VideoError(f"{path}: found {found}; start at 0 or later, take every 1 or more, at least 1 frame")
    if not path.exists():
        raise VideoError(f"{path} does not exist; give {READABLE}")
    try:
        with _opened(path, fps) as source:
            frames, total = _sampled(source, start, stride, count)
    except (FFmpegError, OSError) as error:
        reason = error.strerror or error
        raise VideoError(f"{path} cannot be read as a video: {reason}; give {READABLE}") from error
    _check_length(path, len(frames), total, start, stride, count)
    sizes = list(dict.fromkeys(f"{frame.shape[1]}x{frame.shape[0]}" for frame in frames))
    if len(sizes) > 1:
        raise VideoError(f"{path}: frames of one size are needed, found {', '.join(sizes)}; resize them")
    return Video(np.stack(frames), source.fps / stride)


@contextmanager
def _opened(path: Path, fps: float) -> Generator[_Source, None, None]:
    if path.is_dir():
        yield _Source(_pictures(path), _from_file, fps)
    elif path.suffix.lower() == ".webp":  # FFmpeg does not decode moving WebP
        with Image.open(path) as image:
            image.load()  # only now is the duration known
            rate = 1000 / image.info["duration"] if image.info.get("duration") else fps
            yield _Source(ImageSequence.Iterator(image), _from_image, rate)
    else:
        # absolute, or FFmpeg takes the "12" of "12:30.mp4" for a protocol
        with av.open(str(path.absolute())) as container:
            stream: Any = container.streams.best("video")
            if stream is None or stream.codec_context.name == "ansi":  # FFmpeg would film a text file
                raise VideoError(f"{path} holds no pictures, only sound or text; give {READABLE}")
            stream.thread_type = "AUTO"
            yield _Source(container.decode(stream), _from_frame, _rate(container, stream) or fps)


def _rate(container: Any, stream: Any) -> float | None:
    """Mean frames a second, None if the file does not say."""
    if container.format.name == "gif" and stream.frames and stream.duration:  # its average is of a few frames
        return float(stream.frames / (stream.duration * stream.time_base))
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


def _pictures(folder: Path) -> list[Path]:
    """The picture files of a folder, 2.png before 10.png."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in PICTURES and file.name[0] != "."]
    return sorted(files, key=lambda file: [int(n) if n.isdecimal() else n for n in re.split(r"(\d+)", file.name)])


def _from_file(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return _from_image(ImageOps.exif_transpose(image))


def _from_image(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGB"))


def _from_frame(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as it is meant to be seen: phones film on their side and say so in `rotation`."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def _sampled(source: _Source, start: int, stride: int, count: int | None) -> tuple[list[np.ndarray], int]:
    """The chosen frames, and how many were passed on the way: if too few were found, all there are."""
    last = None if count is None else start + (count - 1) * stride
    frames, total = [], 0
    for number, picture in enumerate(source.pictures):
        total = number + 1
        if number >= start and (number - start) % stride == 0:
            frames.append(source.to_HWC(picture))
        if number == last:
            break
    return frames, total


def _check_length(path: Path, found: int, total: int, start: int, stride: int, count: int | None) -> None:
    if total == 0:
        raise VideoError(f"{path} has no frames; give {READABLE}")
    has = f"{path} has {_frames(total)}"
    if found == 0:
        raise VideoError(f"{has}; none from {start}; start at {total - 1} or before")
    if count is not None and found < count:
        need, narrower = start + (count - 1) * stride + 1, (total - 1 - start) // (count - 1)
        take = f"take {_frames(found)}" + (f", or every {narrower}" if narrower else "")
        raise VideoError(f"{has}; {_frames(count)}, every {stride} from {start}, need {need}; {take}")


def _frames(number: int) -> str:
    return f"{number} frame" if number == 1 else f"{number} frames"


# Writing


class _Format(NamedTuple):
    """How a kind of file is written."""

    codec: str
    frames: Callable[[Video, Fraction], Iterator[av.VideoFrame]]
    codec_options: dict[str, str]
    file_options: dict[str, str]


def write(video: Video, path: str | Path) -> None:
    """A clip as .mp4, .webm or .gif; without an extension or with a final "/", as a folder of PNGs.

    Appears whole or not at all. In .mp4 and .webm an odd side grows by one pixel: they need even ones.

    Raises:
        VideoError: An unknown extension, a rate the format cannot show, a place that cannot be written.
    """
    is_folder = str(path).endswith(("/", os.sep))
    path = Path(path)
    if is_folder or not path.suffix:
        return write_frames(video, path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        known = ", ".join(FORMATS)
        raise VideoError(f"{path}: found {suffix}, can write {known}, or a folder if the name ends with /")
    if suffix == ".gif" and video.fps > FASTEST_GIF:
        most = f"a GIF shows at most {FASTEST_GIF} frames a second, this clip has {video.fps:g}"
        raise VideoError(f"{path}: {most}; write .mp4, or take fewer frames")
    with _replacing(path) as draft:
        _encode(video, draft, suffix)


def write_frames(video: Video, folder: str | Path) -> None:
    """A clip as 00000.png, 00001.png, …; appears whole or not at all, in place of an older folder of frames.

    Raises:
        VideoError: A folder with anything else in it, a place that cannot be written.
    """
    folder = Path(folder)
    present = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    others = [name for name in present if not re.fullmatch(r"\d{5,}\.png", name)]
    if others:
        raise VideoError(f"{folder} has more than frames in it: found {others[0]}; choose another folder")
    with _replacing(folder) as draft:
        draft.mkdir()
        for number, frame in enumerate(video.frames_THWC):
            Image.fromarray(frame).save(draft / f"{number:05d}.png")
        if folder.is_dir():
            shutil.rmtree(folder)


def write_image(image_HWC: np.ndarray, path: str | Path) -> None:
    """A picture (uint8, RGB) as PNG; appears whole or not at all.

    Raises:
        VideoError: A place that cannot be written.
    """
    with _replacing(Path(path)) as draft:
        Image.fromarray(image_HWC).save(draft, format="PNG")


@contextmanager
def _replacing(path: Path) -> Generator[Path, None, None]:
    """A temporary name beside `path`: becomes `path` when the block ends well, vanishes when not."""
    draft = path.absolute().with_name(f".{uuid4().hex}.part")
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            os.replace(draft, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)  # if it is a folder
            draft.unlink(missing_ok=True)
    except (FFmpegError, OSError) as error:
        reason = error.strerror or error
        raise VideoError(f"{path} cannot be written: {reason}; free this place or choose another") from error


def _encode(video: Video, file: Path, suffix: str) -> None:
    kind = FORMATS[suffix]
    rate = Fraction(video.fps).limit_denominator(10_000)  # 29.97002997… becomes 30000/1001
    frames = kind.frames(video, rate)
    first = next(frames)
    with av.open(str(file), "w", format=suffix[1:], options=kind.file_options) as container:
        stream: Any = container.add_stream(kind.codec, rate, kind.codec_options)
        for name in ("width", "height", "colorspace", "color_range", "color_trc", "color_primaries"):
            setattr(stream, name, getattr(first, name))
        stream.pix_fmt = first.format.name
        for frame in chain([first], frames):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _timed(video: Video, rate: Fraction) -> Iterator[av.VideoFrame]:
    for number, frame in enumerate(video.frames_THWC):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts, picture.time_base = number, 1 / rate
        yield picture


def _in_yuv(video: Video, rate: Fraction) -> Iterator[av.VideoFrame]:
    """Frames in the colours of television (BT.709), which players expect; these need even sides."""
    even = ((0, 0), (0, video.height % 2), (0, video.width % 2), (0, 0))
    for frame in _timed(Video(np.pad(video.frames_THWC, even, mode="edge"), video.fps), rate):
        yield frame.reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            dst_color_trc=ColorTrc.BT709,
            dst_color_primaries=ColorPrimaries.BT709,
        )


def _in_palette(video: Video, rate: Fraction) -> Iterator[av.VideoFrame]:
    """Frames in the 256 colours that suit the whole clip best, so that still parts do not flicker."""
    graph = av.filter.Graph()
    rgb = av.VideoFormat("rgb24")
    frames = graph.add_buffer(width=video.width, height=video.height, format=rgb, time_base=1 / rate)
    both, best, dither, out = map(graph.add, ("split", "palettegen", "paletteuse", "buffersink"))
    frames.link_to(both)
    both.link_to(dither, 0, 0)
    both.link_to(best, 1, 0)
    best.link_to(dither, 0, 1)
    dither.link_to(out)
    graph.configure()
    for frame in _timed(video, rate):
        graph.vpush(frame)
    graph.vpush(None)
    for _ in range(video.frames):
        yield graph.vpull()


FORMATS = {
    # faststart: a browser can play it while it loads
    ".mp4": _Format("libx264", _in_yuv, {"crf": "18", "preset": "medium"}, {"movflags": "+faststart"}),
    ".webm": _Format("libvpx-vp9", _in_yuv, {"crf": "24", "b": "0", "cpu-used": "4"}, {}),
    ".gif": _Format("gif", _in_palette, {}, {"loop": "0"}),
}
