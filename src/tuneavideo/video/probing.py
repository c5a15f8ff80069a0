"""Facts on a video file and its comment, without decoding."""

from pathlib import Path
from typing import Any, NamedTuple

import av
from av.error import FFmpegError
from PIL import Image

from tuneavideo.errors import VideoError
from tuneavideo.storage import atomic
from tuneavideo.video.reading import BROKEN_PICTURE
from tuneavideo.video.sources import _container, _is_webp, _pictured, measure


class Probe(NamedTuple):
    """Facts on a video file.

    Attributes:
        width: Width of the coded frames in pixels.
        height: Height of the coded frames in pixels.
        seconds: Duration.
        fps: Frames per second.
        comment: Text of the comment in its metadata; empty without one.
    """

    width: int
    height: int
    seconds: float
    fps: float
    comment: str


def probe(path: Path) -> Probe:
    """Return facts on a video file. Raises VideoError when it cannot be read as a video."""
    try:
        if _is_webp(path):
            with Image.open(path) as image:
                size, comment = image.size, ""
        else:
            with _container(path) as container:
                stream = _pictured(path, container)
                size, comment = (stream.width, stream.height), container.metadata.get("comment", "")
        extent = measure(path, 8.0)
    except (FFmpegError, OSError, MemoryError, *BROKEN_PICTURE) as error:
        reason = getattr(error, "strerror", None) or error or "not enough memory"
        raise VideoError(f"{path.name} cannot be read as a video: {reason}") from error
    return Probe(*size, extent.seconds, extent.fps, comment)


def with_comment(source: Path, path: Path, comment: str) -> None:
    """Copy a video file without encoding it again, with a comment in its metadata. Raises DiskError."""
    with (
        atomic.replacing(path) as draft,
        av.open(str(source)) as before,
        av.open(str(draft), "w", format=path.suffix[1:], options={"movflags": "+faststart"}) as after,
    ):
        after.metadata["comment"] = comment
        streams: dict[int, Any] = {each.index: after.add_stream_from_template(each) for each in before.streams}
        for packet in before.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                after.mux(packet)
