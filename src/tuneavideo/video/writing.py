"""Encoding of clips to files and folders of images; a failed write leaves nothing behind."""

import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from heapq import merge
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import av
import av.filter
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from tuneavideo.errors import VideoError
from tuneavideo.storage import atomic
from tuneavideo.video.audio import RATE, sound_frames
from tuneavideo.video.clip import AnyVideo, VideoStream, resize
from tuneavideo.video.display import pull_frames

FASTEST_GIF = 50  # frames a second; browsers slow faster ones down


class _Format(NamedTuple):
    """Codecs and options of a file format."""

    codec: str
    frames: Callable[[Iterator[np.ndarray], Fraction], Iterator[av.VideoFrame]]
    codec_options: dict[str, str]
    file_options: dict[str, str]
    sound: str | None


def write(video: AnyVideo | VideoStream, path: str | Path) -> None:
    """Write a clip as .mp4, .webm or .gif; without an extension or with a final "/", as a folder of PNGs.

    The file is complete or absent. .mp4 and .webm keep the sound, and pad odd sides by one pixel, since they need even
    ones. Only a few frames of a `VideoStream` are in memory at a time.

    Raises:
        VideoError: The extension is unknown, or the format cannot show the frame rate.
        DiskError: The file cannot be written, or the disk is full.
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
    with atomic.replacing(path) as draft:
        _encode(video, draft, suffix, FORMATS[suffix])


def encode_for_page(video: AnyVideo, most: int = 512) -> bytes:
    """Encode a clip as the bytes of an .mp4 for a web page: silent, no side above `most` pixels, quick to seek."""
    scale = min(1, most / max(video.width, video.height))
    width, height = (max(1, round(side * scale)) for side in (video.width, video.height))
    images = (resize(image, width, height, "stretch") for image in video.images) if scale < 1 else video.images
    with io.BytesIO() as file:
        _encode(VideoStream(images, video.fps), file, ".mp4", PAGE)
        return file.getvalue()


def write_frames(video: AnyVideo | VideoStream, folder: str | Path) -> None:
    """Write a clip as 00000.png, 00001.png, ...; an older folder of frames is replaced.

    Raises:
        VideoError: The folder has other files.
        DiskError: The folder cannot be written, or the disk is full.
    """
    folder = Path(folder)
    present = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    others = [name for name in present if not re.fullmatch(r"\d{5,}\.png", name)]
    if others:
        raise VideoError(f"{folder} has more than frames in it: found {others[0]}; choose another folder")
    with atomic.replacing(folder) as draft:
        draft.mkdir()
        for number, frame in enumerate(video.images):
            Image.fromarray(frame).save(draft / f"{number:05d}.png")


def write_image(image_HWC: np.ndarray, path: str | Path) -> None:
    """Write an RGB image (uint8) as PNG. Raises DiskError."""
    with atomic.replacing(Path(path)) as draft:
        Image.fromarray(image_HWC).save(draft, format="PNG")


def _encode(video: AnyVideo | VideoStream, file: Path | IO[bytes], suffix: str, kind: _Format) -> None:
    rate = Fraction(video.fps).limit_denominator(10_000)  # 29.97002997… becomes 30000/1001
    frames = kind.frames(video.images, rate)
    first = next(frames)
    with av.open(file, "w", format=suffix[1:], options=kind.file_options) as container:
        stream: Any = container.add_stream(kind.codec, rate, kind.codec_options)
        for name in ("width", "height", "colorspace", "color_range", "color_trc", "color_primaries"):
            setattr(stream, name, getattr(first, name))
        stream.pix_fmt = first.format.name
        streams: dict[type, Any] = {av.VideoFrame: stream}
        sound: Iterator[av.AudioFrame] = iter(())
        if kind.sound and video.sound_SC is not None:
            streams[av.AudioFrame] = container.add_stream(kind.sound, RATE, layout="stereo", bit_rate=192_000)
            sound = sound_frames(video.sound_SC)
        in_time: Iterator[Any] = merge(chain([first], frames), sound, key=_time)
        for frame in in_time:
            container.mux(streams[type(frame)].encode(frame))
        for each in streams.values():
            container.mux(each.encode(None))


def _time(frame: Any) -> float:
    return frame.time


def _timed(images: Iterator[np.ndarray], rate: Fraction) -> Iterator[av.VideoFrame]:
    for number, image in enumerate(images):
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        picture.pts, picture.time_base = number, 1 / rate
        yield picture


def _in_yuv(images: Iterator[np.ndarray], rate: Fraction) -> Iterator[av.VideoFrame]:
    """Convert images to YUV 4:2:0 frames with even sides, in the colours that players expect (BT.709)."""
    for frame in _timed(map(_even, images), rate):
        yield frame.reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            dst_color_trc=ColorTrc.BT709,
            dst_color_primaries=ColorPrimaries.BT709,
        )


def _even(image_HWC: np.ndarray) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    return np.pad(image_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _in_palette(images: Iterator[np.ndarray], rate: Fraction) -> Iterator[av.VideoFrame]:
    """Convert images to frames of one palette of 256 colours for the whole clip, so that still parts do not flicker.

    The palette is known after the last frame; a temporary file holds the frames until then.
    """
    with tempfile.TemporaryFile() as file:
        first = next(images)
        model = next(_timed(iter([first]), rate))
        choosing = _graph("palettegen", [model])
        for frame in _timed(chain([first], images), rate):
            choosing.vpush(frame)
            if list(pull_frames(choosing)):
                raise RuntimeError("FFmpeg chose a palette before the last frame")
            file.write(frame.to_ndarray().tobytes())
        choosing.vpush(None)
        (palette,) = pull_frames(choosing)
        drawing = _graph("paletteuse", [model, palette])
        drawing.vpush(palette, at=1)
        drawing.vpush(None, at=1)
        file.seek(0)
        stored = iter(lambda: file.read(first.nbytes), b"")
        arrays = (np.frombuffer(pixels, np.uint8).reshape(first.shape) for pixels in stored)
        for each in _timed(arrays, rate):
            drawing.vpush(each, at=0)
            yield from pull_frames(drawing)


def _graph(name: str, inputs: list[av.VideoFrame]) -> av.filter.Graph:
    """Build a graph of one filter for frames like `inputs`."""
    graph = av.filter.Graph()
    node = graph.add(name)
    for number, frame in enumerate(inputs):
        layout = {"width": frame.width, "height": frame.height, "format": frame.format}
        graph.add_buffer(**layout, time_base=frame.time_base).link_to(node, 0, number)
    node.link_to(graph.add("buffersink"))
    graph.configure()
    return graph


FORMATS = {
    # cpu-independent: otherwise x264 may encode the same frames differently, on one machine too.
    # faststart: a browser can play it while it loads. A lookahead of 10 frames instead of 40 needs a quarter of the
    # memory; files are as large and 0.1 dB worse.
    ".mp4": _Format(
        "libx264",
        _in_yuv,
        {"crf": "18", "preset": "medium", "rc-lookahead": "10", "x264-params": "cpu-independent=1"},
        {"movflags": "+faststart"},
        "aac",
    ),
    ".webm": _Format("libvpx-vp9", _in_yuv, {"crf": "24", "b": "0", "cpu-used": "4"}, {}, "libopus"),
    ".gif": _Format("gif", _in_palette, {}, {"loop": "0"}, None),
}
# In memory, so without faststart, which opens the file again; frequent keyframes, for stepping back.
PAGE = _Format(
    "libx264",
    _in_yuv,
    {"crf": "23", "preset": "medium", "bf": "0", "g": "6", "x264-params": "cpu-independent=1"},
    {},
    None,
)
