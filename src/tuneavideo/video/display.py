"""Conversion of decoded frames to RGB as a player shows them: rotation, pixel aspect, alpha, HDR, interlacing."""

from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import av.filter
import numpy as np
from av.error import BlockingIOError, EOFError
from av.sidedata.sidedata import Type
from av.video.reformatter import Colorspace, ColorTrc, Interpolation
from PIL import Image

HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
UNSPECIFIED = 2  # FFmpeg's AVCOL_SPC_UNSPECIFIED
HD = 720  # rows from which players assume BT.709 where a file does not specify it, and BT.601 below
WIDEST_PIXEL = 4  # largest aspect ratio of a pixel that is believed
WHITE = 203  # nits of SDR white in HDR (BT.2408)
PEAK = 1000  # nits that are mapped to 255; brighter ones clip
KNEE = 0.5  # fraction of SDR white below which tone mapping changes nothing
BT2020_TO_BT709 = np.array(  # linear light, of BT.2087
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)


def display_pixels(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> np.ndarray:
    """Convert a frame to RGB H W 3: upright, with square pixels, transparency over white.

    `pixel_aspect` is the width of its pixels divided by their height; None for square ones.
    """
    width, height = _square(frame.width, frame.height, pixel_aspect)
    form = {}
    if (width, height) != (frame.width, frame.height):
        form = {"width": width, "height": height, "interpolation": Interpolation.LANCZOS}
    if frame.colorspace == UNSPECIFIED and not frame.format.is_rgb and min(frame.width, frame.height) >= HD:
        form["src_colorspace"] = Colorspace.ITU709
    if frame.color_trc in HDR:
        image = _tone_mapped(frame.to_ndarray(format="rgb48le", **form), HDR[ColorTrc(frame.color_trc)])
    elif frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        image = over_white(Image.fromarray(frame.to_ndarray(format="rgba", **form)))
    else:
        image = frame.to_ndarray(format="rgb24", **form)
    return _upright(image, frame)


def over_white(image: Image.Image) -> np.ndarray:
    """Convert an image to RGB H W 3 on a white background."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


def _square(width: int, height: int, pixel_aspect: Fraction | None) -> tuple[int, int]:
    """Return the size at which pixels are square; the side that is too short grows."""
    aspect = pixel_aspect or 1
    if not 1 / WIDEST_PIXEL <= aspect <= WIDEST_PIXEL:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))


def _upright(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Rotate by quarters and mirror as the frame's display matrix says."""
    side_data: Any = frame.side_data
    matrices = [data for data in side_data if data.type == Type.DISPLAYMATRIX]
    if not matrices:
        return image
    (a, b, _), (c, d, _), _ = np.frombuffer(bytes(matrices[0]), np.int32).reshape(3, 3).tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):  # shown at x' = ax + cy, y' = bx + dy
        image, a, d = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def deinterlace(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """Deinterlace the interlaced frames of a stream (bwdif); number and timestamps stay."""
    graph = layout = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph, layout = _deinterlacer(frame), _layout(frame)
        if graph is not None and _layout(frame) == layout:  # a filter takes one layout only
            graph.push(frame)
            yield from pull_frames(graph)
        else:
            yield frame
    if graph is not None:
        graph.push(None)
        yield from pull_frames(graph)


def _layout(frame: av.VideoFrame) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name


def _deinterlacer(frame: av.VideoFrame) -> av.filter.Graph:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
    )
    graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
    graph.configure()
    return graph


def pull_frames(graph: av.filter.Graph) -> Iterator[av.VideoFrame]:
    """Yield the frames that a graph has finished."""
    while True:
        try:
            yield graph.vpull()
        except (BlockingIOError, EOFError):
            return


def _tone_mapped(image_HWC: np.ndarray, curve: str) -> np.ndarray:
    """Convert HDR (uint16, BT.2020) to SDR (uint8, BT.709); only highlights are compressed (Reinhard et al. 2002)."""
    light = _curve(curve)[image_HWC]
    if curve == "HLG":  # system gamma of 1.2 (BT.2100)
        light *= ((light @ np.array([0.2627, 0.678, 0.0593], np.float32)) ** 0.2)[..., None]
    light *= (10_000 if curve == "PQ" else PEAK) / WHITE
    light = np.maximum(light @ BT2020_TO_BT709.T, 0)
    brightest = np.maximum(light.max(axis=-1, keepdims=True), KNEE)
    above, most = (brightest - KNEE) / (1 - KNEE), (PEAK / WHITE - KNEE) / (1 - KNEE)
    rolled = above * (1 + above / most**2) / (1 + above)  # eq. 4: 1 at `most`
    light *= (KNEE + (1 - KNEE) * rolled) / brightest
    return (np.clip(light, 0, 1) ** (1 / 2.4) * 255).round().astype(np.uint8)  # BT.1886


@cache
def _curve(name: str) -> np.ndarray:
    """Compute the light, 0..1, of the 65,536 values of a PQ or HLG signal (BT.2100)."""
    signal = np.linspace(0, 1, 2**16)
    if name == "PQ":
        root = signal ** (4096 / 2523 / 128)
        light = (np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
    else:
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    return light.astype(np.float32)
