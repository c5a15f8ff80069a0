"""Decoding of clips to images with timestamps: folders of images, WebP files, and all that FFmpeg reads."""

import logging
import math
import re
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from statistics import mean, median_low
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from PIL import Image, ImageOps, ImageSequence

from tuneavideo.errors import VideoError
from tuneavideo.video.audio import read_sound
from tuneavideo.video.display import deinterlace, display_pixels, over_white

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
READABLE = "mp4, mov, webm, mkv, avi, gif, webp or a folder of pictures"
LARGEST = 2**26  # pixels of a frame, 8192 x 8192
FASTEST = 1000  # highest frame rate that is believed
LONGEST = 600  # longest duration of a frame that is believed, in seconds
SEEK_FROM = 2  # seconds; frames before are decoded rather than skipped
GAPS = 5  # gaps in the numbers of a folder's images that a warning lists
NOT_MOVING = Disposition.attached_pic | Disposition.timed_thumbnails

logger = logging.getLogger(__name__)


class Extent(NamedTuple):
    """Length of a clip, found without decoding.

    Attributes:
        seconds: Time from the first image to the end of the last one that was examined.
        fps: Frames per second.
        pictures: Number of examined images; 0 if unknown.
        declared: Duration of the whole clip in seconds; as the file declares it if not all of it was examined.
    """

    seconds: float
    fps: float
    pictures: int
    declared: float

    @property
    def total(self) -> int:
        """Number of frames of the whole clip at its own rate."""
        return max(1, round(self.declared * self.fps))


class Source(NamedTuple):
    """An open clip.

    Attributes:
        timeline: Images, each with its end in seconds from the clip's beginning; advancing may invalidate an image.
        to_HWC: Converts an image to RGB H W C.
        fps: Frames per second.
        origin: Beginning of the clip in the file's own time, in seconds.
        length: Duration that the file declares, in seconds; 0 if it does not.
        sound: Reads the sound from a second of the file's own time on, for a number of seconds.
    """

    timeline: Iterator[tuple[Any, float]]
    to_HWC: Callable[[Any], np.ndarray]
    fps: float
    origin: float = 0.0
    length: float = 0.0
    sound: Callable[[float, float], np.ndarray | None] = lambda begin, seconds: None


def measure(path: Path, fps: float, limit: float = math.inf) -> Extent:
    """Measure a clip by its timestamps.

    The result is wrong for a file whose timestamps jump or whose images cannot all be decoded.

    Args:
        path: File or folder.
        fps: Frame rate of a source that has none.
        limit: Seconds after which the examination may end.
    """
    if path.is_dir():
        count = len(_pictures(path))
        return Extent(count / fps, fps, count, count / fps)
    if _is_webp(path):
        with Image.open(path) as image:
            ends = [end for _, end in _webp(image, fps)]
        return Extent(ends[-1], _usual_rate([0.0, *ends[:100]]) or fps, len(ends), ends[-1])
    rate = _rate(path) or fps
    with _container(path) as container:
        stream = _pictured(path, container)
        begin, end, pictures, whole = None, 0.0, 0, True
        for packet in container.demux(stream):
            stamp = packet.dts if packet.pts is None else packet.pts
            if packet.is_corrupt or packet.is_discard or not packet.size or (begin is None and not packet.is_keyframe):
                continue
            time = pictures / rate if stamp is None else float(stamp * stream.time_base)
            begin = time if begin is None else begin
            if time < begin:  # shown before the first image that can be decoded
                continue
            lasts = float((packet.duration or 0) * stream.time_base)
            end, pictures = max(end, time - begin + (lasts if 0 < lasts < LONGEST else 1 / rate)), pictures + 1
            if end > limit:
                whole = False
                break
        return Extent(end, rate, pictures, end if whole and pictures else max(end, _length(container, stream)))


def _length(container: InputContainer, stream: Any) -> float:
    """Return the declared duration in seconds; 0 if there is none or it may be that of the sound."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return 0.0 if container.streams.audio else (container.duration or 0) / av.time_base


@contextmanager
def open_source(path: Path, begin: Callable[[float], float], fps: float) -> Generator[Source, None, None]:
    """Open a clip for reading.

    Args:
        path: File or folder.
        begin: Returns the second from which images are needed, given the rate; earlier ones may be left out.
        fps: Frame rate of a source that has none.
    """
    if path.is_dir():
        files = _pictures(path)
        _warn_of_gaps(path, files)
        timeline = ((file, number / fps) for number, file in enumerate(files, start=1))
        yield Source(timeline, _from_file, fps)
    elif _is_webp(path):  # FFmpeg does not decode animated WebP
        with Image.open(path) as image:
            _check_area(path, *image.size)
            ends = [end for _, end in islice(_webp(image, fps), 100)]
            yield Source(_webp(image, fps), over_white, _usual_rate([0.0, *ends]) or fps)
    else:
        with _open_video(path, begin, fps) as source:
            yield source


def _check_area(path: Path, width: int, height: int) -> None:
    if width * height > LARGEST:
        raise VideoError(
            f"{path} has frames of {width} x {height}; at most {LARGEST:,} pixels, such as 8192 x 8192, are read; "
            "scale it down first"
        )


def _pictures(folder: Path) -> list[Path]:
    """List the images of a folder in natural order: 2.png before 10.png."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in PICTURES and file.name[0] != "."]
    return sorted(files, key=lambda file: [int(n) if n.isdecimal() else n for n in re.split(r"(\d+)", file.name)])


def _warn_of_gaps(folder: Path, files: list[Path]) -> None:
    """Warn of numbers that are missing between images whose names differ in one number only."""
    named = [re.fullmatch(r"(.*?)(\d+)(\D*)", file.name) for file in files]
    if len({name and (name[1], name[3]) for name in named}) != 1 or not all(named):
        return
    numbers = [int(name[2]) for name in named if name]
    gaps = [(low + 1, high - 1) for low, high in pairwise(numbers) if high > low + 1]
    if gaps and len({high - low for low, high in pairwise(numbers)}) > 1:  # every second image is no gap
        missing = ", ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in gaps[:GAPS])
        more = ", ..." if len(gaps) > GAPS else ""
        logger.warning(
            "%s: there is no picture %s%s; those before and after are taken as neighbours", folder, missing, more
        )


def _from_file(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        _check_area(file, *image.size)
        if getattr(image, "is_animated", False):
            raise VideoError(f"{file} moves, and a folder is read as still pictures; give the file itself")
        return over_white(ImageOps.exif_transpose(image))


def _is_webp(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return path.suffix.lower() == ".webp" or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


def _webp(image: Image.Image, fps: float) -> Iterator[tuple[Image.Image, float]]:
    """Yield the images of a WebP file, each with its end in seconds."""
    end = 0.0
    for picture in ImageSequence.Iterator(image):
        picture.load()  # sets the duration
        end += (picture.info.get("duration") or 1000 / fps) / 1000
        yield picture, end


def _usual_rate(times: Iterable[float]) -> float | None:
    """Estimate the frame rate from timestamps, without unusually long and short frames; None if there are too few."""
    steps = [step for begin, end in pairwise(sorted(times)) if (step := end - begin) >= 1 / FASTEST]
    usual = median_low(steps) if steps else 0
    return 1 / mean(step for step in steps if usual / 2 < step < usual * 1.5) if steps else None


@contextmanager
def _open_video(path: Path, begin: Callable[[float], float], fps: float) -> Generator[Source, None, None]:
    rate = _rate(path) or fps
    with _container(path) as container:
        stream = _pictured(path, container)
        # FFmpeg's frame threads for HEVC wait forever for an image that a damaged file refers to and lacks
        stream.thread_type = "SLICE" if stream.codec_context.name == "hevc" else "AUTO"
        frames, origin = _from_second(path, container, stream, begin(rate))
        length = _length(container, stream)
        upright = partial(display_pixels, pixel_aspect=stream.sample_aspect_ratio)
        yield Source(
            _timeline(deinterlace(frames), origin, 1 / rate), upright, rate, origin, length, partial(_sound, path)
        )


def _container(path: Path) -> InputContainer:
    # absolute, since FFmpeg takes the "12" of "12:30.mp4" for a protocol
    return av.open(str(path.absolute()), metadata_errors="replace")


def _pictured(path: Path, container: InputContainer) -> Any:
    """Return the video stream: the default one, of several the largest; never cover art."""
    streams = [stream for stream in container.streams.video if not stream.disposition & NOT_MOVING]
    known: list[Any] = [stream for stream in streams if stream.codec_context]
    if streams and not known:
        raise VideoError(f"{path} is in a format that cannot be decoded; convert it, or give {READABLE}")
    known = [stream for stream in known if stream.codec_context.name != "ansi"]  # FFmpeg renders text files
    if not known:
        raise VideoError(f"{path} holds no pictures, only sound or text; give {READABLE}")
    best = max(known, key=lambda stream: (stream.disposition & Disposition.default, stream.width * stream.height))
    _check_area(path, best.width, best.height)
    return best


def _rate(path: Path) -> float | None:
    """Return the declared frame rate if the first timestamps agree, otherwise the rate of those; None if unknown."""
    with _container(path) as container:
        stream = _pictured(path, container)
        packets = islice(container.demux(stream), 100)
        stamps = [packet.dts if packet.pts is None else packet.pts for packet in packets]
        usual = _usual_rate(float(stamp * stream.time_base) for stamp in stamps if stamp is not None)
        declared = float(stream.average_rate or stream.guessed_rate or 0)
        if usual is None or abs(declared / usual - 1) < 0.01:
            return declared if 0 < declared <= FASTEST else None
        return usual


def _from_second(
    path: Path, container: InputContainer, stream: Any, begin: float
) -> tuple[Iterator[av.VideoFrame], float]:
    """Return decoded frames from `begin` (seconds into the clip) or shortly before, and the clip's first timestamp."""
    if begin > SEEK_FROM and stream.start_time is not None:
        origin = float(stream.start_time * stream.time_base)
        for early in (1, 10):  # seconds; seeking is inexact
            try:
                container.seek(int((origin + max(begin - early, 0)) / stream.time_base), stream=stream)
            except FFmpegError:  # the format cannot seek; it is still at its beginning
                break
            frames = _decoded(path, container, stream)
            first = next(frames, None)
            if first is not None and first.time is not None and first.time <= origin + begin:
                return chain([first], frames), origin
        else:
            container.seek(0)
    frames = _decoded(path, container, stream)
    first = next(frames, None)
    if first is None:
        return iter(()), 0.0
    return chain([first], frames), first.time or 0.0


def _decoded(path: Path, container: InputContainer, stream: Any) -> Iterator[av.VideoFrame]:
    """Yield frames in display order, from the first complete one: cut streams begin with incomplete ones."""
    decoder, begun, last, damage = _decoder(stream), False, None, None
    for packet in container.demux(stream):
        frames, damage = [], "a part is missing" if packet.is_corrupt else None
        try:
            if begun or not damage:
                frames = decoder.decode(None if damage else packet)
                begun = True
        except FFmpegError as error:
            damage = error.strerror
        for last in frames:
            last.time_base = stream.time_base  # unknown after a missing part
            yield last
        if damage and last:
            break
    if damage:
        when = f"after {last.time or 0:.2f} s" if last else "from its first frame on"
        how = f"take other frames, or repair it: ffmpeg -i {path.name} repaired.mp4"
        raise VideoError(f"{path} is damaged {when}: {damage}; {how}")


def _decoder(stream: Any) -> Any:
    """Return the stream's decoder; for VP8 and VP9 with alpha libvpx, since FFmpeg's ignores alpha."""
    if stream.metadata.get("alpha_mode") != "1":
        return stream.codec_context
    return av.CodecContext.create("libvpx-vp9" if stream.codec_context.name == "vp9" else "libvpx", "r")


def _timeline(frames: Iterator[av.VideoFrame], origin: float, tick: float) -> Iterator[tuple[av.VideoFrame, float]]:
    """Yield frames with their ends. A missing or impossible timestamp becomes the frame before plus `tick`."""
    shown, at, damage = None, 0.0, None
    try:
        for frame in frames:
            time = None if frame.time is None else frame.time - origin
            if shown is not None:
                if time is None or not 0 <= time - at < LONGEST:
                    time = at + tick
                yield shown, time
            shown, at = frame, time or 0.0
    except VideoError as error:
        damage = error
    if shown is not None:
        lasts = float(shown.duration * shown.time_base) if shown.time_base else 0.0
        yield shown, at + (lasts if 0 < lasts < LONGEST else tick)
    if damage is not None:
        raise damage


def _sound(path: Path, begin: float, seconds: float) -> np.ndarray | None:
    try:
        with _container(path) as container:
            return read_sound(container, begin, seconds)
    except (FFmpegError, ValueError) as error:
        warnings.warn(f"{path}: its sound cannot be read ({error}); it is taken as silent", stacklevel=2)
        return None
