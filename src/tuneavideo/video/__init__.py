"""Clips: read, choose, fit, write. The only package that knows PyAV.

Axes: T frames, H rows, W columns, C = 3 channels (red, green, blue), pixels uint8 in 0..255; S samples of sound.

    clip.py     the forms of a clip: `Video` in memory, `DiskVideo` on the disk, `VideoStream` one at a time; sizes
    reading.py  from a clip that is open to the chosen frames, by what is shown at each moment
    sources.py  opens folders, WebP files and all that FFmpeg reads
    display.py  from a decoded frame to what is meant to be seen: turns, pixel shapes, alpha, HDR, interlacing
    sound.py    the sound of a span of seconds, and its frames for writing
    writing.py  from a clip to a file or folder, whole or not at all
"""

from tuneavideo.video.clip import AnyVideo, DiskVideo, Fit, Video, VideoStream, area_size, collect, resize
from tuneavideo.video.reading import Span, choose_span, read, read_any
from tuneavideo.video.writing import FASTEST_GIF, encode_for_page, write, write_frames, write_image

__all__ = [
    "FASTEST_GIF",
    "AnyVideo",
    "DiskVideo",
    "Fit",
    "Span",
    "Video",
    "VideoStream",
    "area_size",
    "choose_span",
    "collect",
    "encode_for_page",
    "read",
    "read_any",
    "resize",
    "write",
    "write_frames",
    "write_image",
]
