"""Reading and writing of clips; the only package that imports PyAV.

Axes: T frames, H rows, W columns, C = 3 channels (red, green, blue), pixels uint8 in 0..255; S samples of sound.

    clip.py     `Video` in memory, `DiskVideo` on disk, `VideoStream` one frame at a time; resizing
    reading.py  selection of frames by time
    sources.py  decoding of videos, WebP files and folders of images
    probing.py  facts and comment of a file
    display.py  conversion of decoded frames to RGB: rotation, pixel aspect, alpha, HDR, interlacing
    audio.py    sound
    montage.py  clips side by side, contact sheets
    writing.py  encoding to files and folders of images
"""

from tuneavideo.video.clip import AnyVideo, DiskVideo, Fit, Video, VideoStream, area_size, collect, resize
from tuneavideo.video.probing import Probe, probe, with_comment
from tuneavideo.video.reading import Span, choose_span, read, read_any
from tuneavideo.video.writing import FASTEST_GIF, encode_for_page, write, write_frames, write_image

__all__ = [
    "FASTEST_GIF",
    "AnyVideo",
    "DiskVideo",
    "Fit",
    "Probe",
    "Span",
    "Video",
    "VideoStream",
    "area_size",
    "choose_span",
    "collect",
    "encode_for_page",
    "probe",
    "read",
    "read_any",
    "resize",
    "with_comment",
    "write",
    "write_frames",
    "write_image",
]
