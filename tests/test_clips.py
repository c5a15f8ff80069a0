"""Clips of every kind are read with the right frames, which are identified by the numbers drawn into them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import Colorspace

from tests.clips import HLG, PQ, animate, barcode, barcodes, encode, numbers, see_through
from tuneavideo.errors import VideoError
from tuneavideo.video import read

COUNT = 12
TELEVISION = Fraction(30000, 1001)
INTERLACED = {"flags": "+ildct+ilme", "x264-params": "interlaced=1"}  # the lower rows come first

# name: file, size, codec, pixels, rate, and what else `encode` takes
FILMS = {
    "mp4 h264": ("mp4", (96, 64), "libx264", "yuv420p", 25, {}),
    "mp4 h264 of television's rate": ("mp4", (96, 64), "libx264", "yuv420p", TELEVISION, {}),
    "mp4 h264 4:4:4": ("mp4", (96, 64), "libx264", "yuv444p", 24, {}),
    "mp4 h264 10 bit": ("mp4", (96, 64), "libx264", "yuv420p10le", 50, {}),
    "mp4 h264 4:2:2 10 bit": ("mp4", (96, 64), "libx264", "yuv422p10le", 30, {}),
    "mp4 h264 full range": ("mp4", (96, 64), "libx264", "yuvj420p", 30, {}),
    "mp4 h264 without B frames": ("mp4", (96, 64), "libx264", "yuv420p", 15, {"options": {"bf": "0", "g": "1"}}),
    "mp4 hevc": ("mp4", (96, 64), "libx265", "yuv420p", 25, {"options": {"x265-params": "log-level=none"}}),
    "mp4 hevc 10 bit": ("mp4", (96, 64), "libx265", "yuv420p10le", 60, {"options": {"x265-params": "log-level=none"}}),
    "mp4 av1 10 bit": ("mp4", (96, 64), "libsvtav1", "yuv420p10le", 24, {"options": {"preset": "12"}}),
    "mp4 mpeg4": ("mp4", (96, 64), "mpeg4", "yuv420p", 12, {}),
    "mp4 fragmented": ("mp4", (96, 64), "libx264", "yuv420p", 25, {"file_options": {"movflags": "frag_keyframe"}}),
    "mov prores 4:2:2 10 bit": ("mov", (96, 64), "prores_ks", "yuv422p10le", 24, {}),
    "mov prores alpha": ("mov", (96, 64), "prores_ks", "yuva444p10le", 24, {}),
    "mov animation alpha": ("mov", (96, 64), "qtrle", "argb", 10, {}),
    "mov png alpha": ("mov", (96, 64), "png", "rgba", 10, {}),
    "mov mjpeg 4:2:2": ("mov", (96, 64), "mjpeg", "yuvj422p", 30, {}),
    "mkv ffv1 4:4:4 16 bit": ("mkv", (96, 64), "ffv1", "yuv444p16le", 10, {}),
    "mkv ffv1 rgb of odd size": ("mkv", (97, 63), "ffv1", "bgr0", 10, {}),
    "mkv ffv1 grey": ("mkv", (96, 64), "ffv1", "gray", 10, {}),
    "mkv ffv1 alpha": ("mkv", (96, 64), "ffv1", "yuva420p", 10, {}),
    "mkv h264 of television's rate": ("mkv", (96, 64), "libx264", "yuv420p", TELEVISION, {}),
    "mkv h264 at 240": ("mkv", (96, 64), "libx264", "yuv420p", 240, {}),
    "webm vp8": ("webm", (96, 64), "libvpx", "yuv420p", 30, {}),
    "webm vp8 alpha": ("webm", (96, 64), "libvpx", "yuva420p", 30, {"options": {"auto-alt-ref": "0"}}),
    "webm vp9 of odd size": ("webm", (95, 61), "libvpx-vp9", "yuv420p", 25, {}),
    "webm vp9 4:4:4": ("webm", (96, 64), "libvpx-vp9", "yuv444p", 25, {}),
    "webm av1 10 bit": ("webm", (96, 64), "libsvtav1", "yuv420p10le", 25, {"options": {"preset": "12"}}),
    "webm vp9 alpha": ("webm", (96, 64), "libvpx-vp9", "yuva420p", 25, {"options": {"auto-alt-ref": "0"}}),
    "avi mpeg4": ("avi", (96, 64), "mpeg4", "yuv420p", 25, {}),
    "avi mpeg4 with B frames": ("avi", (96, 64), "mpeg4", "yuv420p", 25, {"options": {"bf": "2"}}),
    "avi huffyuv 4:2:2": ("avi", (96, 64), "huffyuv", "yuv422p", 10, {}),
    "avi uncompressed": ("avi", (96, 64), "rawvideo", "bgr24", 10, {}),
    "ts h264": ("ts", (96, 64), "libx264", "yuv420p", 25, {}),
    "mpg mpeg2": ("mpg", (96, 64), "mpeg2video", "yuv420p", 25, {}),
    "tiny": ("mp4", (16, 16), "libx264", "yuv420p", 10, {"options": {"crf": "1"}}),
    "portrait": ("mp4", (64, 160), "libx264", "yuv420p", 10, {}),
    "wide pixels": ("mp4", (64, 96), "libx264", "yuv420p", 10, {"pixel_aspect": Fraction(4, 3)}),
    "high pixels": ("mkv", (96, 64), "libx264", "yuv420p", 10, {"pixel_aspect": Fraction(1, 2)}),
    "HDR PQ": ("mp4", (96, 64), "libx264", "yuv420p10le", 24, {"curve": PQ}),
    "HDR HLG": ("mp4", (96, 64), "libx264", "yuv420p10le", 24, {"curve": HLG}),
    "interlaced": ("mp4", (96, 64), "libx264", "yuv420p", 25, {"options": INTERLACED}),
}  # fmt: skip
TURNS = [(a, 0, 0, d) for a in (-1, 1) for d in (-1, 1)] + [(0, b, c, 0) for b in (-1, 1) for c in (-1, 1)]
SHOWN = {"wide pixels": (85, 96), "high pixels": (96, 128)}


@pytest.mark.parametrize("name", FILMS)
def test_a_video_of_any_kind_is_read_with_the_right_frames(name: str, tmp_path: Path) -> None:
    suffix, size, codec, pix_fmt, rate, more = FILMS[name]
    images = barcodes(COUNT, *size)
    if "a" in pix_fmt.removeprefix("gray"):
        images = [see_through(image) for image in images]
    path = encode(tmp_path / f"clip.{suffix}", images, codec, pix_fmt, rate, **more)
    video = read(path)
    assert numbers(video) == list(range(COUNT))
    assert (video.width, video.height) == SHOWN.get(name, size)
    assert video.fps == pytest.approx(float(rate), rel=1e-3)
    assert numbers(read(path, start=3, stride=2, count=4)) == [3, 5, 7, 9]
    half = read(path, start_time=float(4 / rate), sample_fps=float(rate / 3), count=3, size=(48, 40), fit="stretch")
    assert numbers(half) == [4, 7, 10] and half.fps == pytest.approx(float(rate) / 3)


@pytest.mark.parametrize("kind", ["gif", "gif of odd size", "webp", "webp alpha", "webp called gif"])
def test_an_animated_image_is_read_with_the_right_frames(kind: str, tmp_path: Path) -> None:
    images = barcodes(COUNT, 95, 61) if "odd" in kind else barcodes(COUNT)
    if "alpha" in kind:
        images = [see_through(image) for image in images]
    path = animate(tmp_path / f"clip.{kind[:4].strip()}", images, 60)
    if "called" in kind:
        path = path.rename(tmp_path / "clip.gif")
    video = read(path)
    assert numbers(video) == list(range(COUNT))
    assert video.fps == pytest.approx(1000 / 60)
    assert numbers(read(path, start=3, stride=2, count=4)) == [3, 5, 7, 9]


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("matrix", TURNS)
def test_a_rotated_or_mirrored_video_is_read_upright(suffix: str, matrix: tuple[int, ...], tmp_path: Path) -> None:
    a, b, c, d = matrix
    shown = barcode(77)
    height, width = shown.shape[:2]
    stored = np.zeros((width, height, 3) if b else (height, width, 3), np.uint8)
    for y, x in np.ndindex(stored.shape[:2]):  # the definition, pixel by pixel
        stored[y, x] = shown[(b * x + d * y) % height, (a * x + c * y) % width]
    video = read(encode(tmp_path / f"clip.{suffix}", [stored] * 2, matrix=matrix))
    assert (video.width, video.height) == (width, height)
    assert numbers(video) == [77, 77]


VARYING = [0.0, 0.04, 0.08, 0.12, 0.49, 0.53, 0.57, 0.79, 0.83, 0.87, 0.91, 0.95]


def shown_at(times: list[float], moment: float) -> int:
    return max([number for number, time in enumerate(times) if time <= moment + 1e-6], default=0)


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm"])
def test_frames_of_a_varying_rate_are_those_shown_at_each_time(suffix: str, tmp_path: Path) -> None:
    path = encode(tmp_path / f"clip.{suffix}", barcodes(12), "libvpx" if suffix == "webm" else "libx264", times=VARYING)
    video = read(path)
    assert video.fps == pytest.approx(25, rel=1e-3), "the rate of most frames, not the mean"
    expected = [shown_at(VARYING, (tick + 0.5) / 25) for tick in range(24)]
    assert numbers(video)[:24] == expected
    assert set(numbers(video)[24:]) <= {11}
    assert numbers(read(path, start_time=0.48, sample_fps=12.5, count=6)) == expected[12::2]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animated_image_with_a_long_last_frame_keeps_its_rate(suffix: str, tmp_path: Path) -> None:
    path = animate(tmp_path / f"clip.{suffix}", barcodes(6), [50, 50, 50, 50, 50, 1000])
    video = read(path)
    assert video.fps == pytest.approx(20)
    assert numbers(video) == [0, 1, 2, 3, 4] + [5] * 20


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_interlaced_frames_show_their_first_field_without_combs(suffix: str, tmp_path: Path) -> None:
    fields = []
    for field in range(16):  # a bar that moves 5 pixels to the right from field to field
        fields.append(np.zeros((64, 96, 3), np.uint8))
        fields[-1][:, 5 * field : 5 * field + 16] = 255
    frames = [np.where(np.arange(64)[:, None, None] % 2, fields[t], fields[t + 1]) for t in range(0, 16, 2)]
    video = read(encode(tmp_path / f"clip.{suffix}", frames, options=INTERLACED | {"crf": "10"}))
    assert video.frames == 8
    lit = video.frames_THWC[:, 8:56, :, 0] > 127
    assert np.abs(lit.argmax(axis=-1) - np.arange(0, 80, 10)[:, None]).max() <= 1, "one edge, not two"


@pytest.mark.parametrize(
    ("nits", "grey"), [(0, 0), (1, 28), (50, 143), (100, 190), (203, 227), (1000, 255), (4000, 255)]
)
def test_hdr_is_as_bright_as_sdr_with_highlights_compressed(nits, grey, tmp_path: Path) -> None:
    root = (nits / 10_000) ** (2610 / 16384)  # SMPTE ST 2084
    signal = ((3424 / 4096 + 2413 / 128 * root) / (1 + 2392 / 128 * root)) ** (2523 / 32)
    image = np.full((64, 64, 3), round(signal * 255), np.uint8)
    video = read(encode(tmp_path / "clip.mp4", [image] * 2, "libx264", "yuv420p10le", curve=PQ, options={"crf": "1"}))
    assert np.abs(video.frames_THWC[0].mean(axis=(0, 1)) - grey).max() < 6


def test_white_of_broadcast_hdr_is_white_of_the_same_light(tmp_path: Path) -> None:
    image = np.full((64, 64, 3), round(0.75 * 255), np.uint8)  # 203 nits (BT.2408)
    video = read(encode(tmp_path / "clip.mp4", [image] * 2, "libx264", "yuv420p10le", curve=HLG, options={"crf": "1"}))
    assert np.abs(video.frames_THWC[0].mean(axis=(0, 1)) - 227).max() < 6


@pytest.mark.parametrize("chosen", [0, 1])
def test_of_several_streams_the_default_is_read_and_a_cover_never(chosen: int, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        streams = [container.add_stream(codec, rate=10) for codec in ("libx264", "libx264", "mjpeg")]
        for stream, width in zip(streams, (32, 96, 320), strict=True):
            stream.width, stream.height, stream.pix_fmt = width, 64, "yuvj420p" if width == 320 else "yuv420p"
        streams[chosen].disposition = Disposition.default
        streams[2].disposition = Disposition.attached_pic
        for number in range(4):
            for stream, first in zip(streams, (100, 0, 200), strict=False):
                if number and stream is streams[2]:
                    continue
                image = barcode(first + number, stream.width)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert [stream.width for stream in container.streams.video] == [32, 96, 320]
    video = read(tmp_path / "clip.mp4")
    assert numbers(video) == [[100, 101, 102, 103], [0, 1, 2, 3]][chosen]


@pytest.fixture(scope="module", params=["mp4", "mov", "mkv", "webm", "avi", "ts"])
def long_clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """250 frames in 10 s, a keyframe every 20."""
    codec = {"webm": "libvpx", "avi": "mpeg4"}.get(request.param, "libx264")
    path = tmp_path_factory.mktemp("long") / f"clip.{request.param}"
    return encode(path, barcodes(250, 64, 32), codec, rate=25, options={"g": "20"})


@pytest.mark.parametrize("start", [51, 120, 160, 233])
def test_a_later_start_is_the_same_frames(long_clip: Path, start: int) -> None:
    assert numbers(read(long_clip, start=start, stride=4, count=5)) == [start + 4 * n for n in range(5)]


def test_frames_long_before_the_start_are_never_decoded(long_clip: Path) -> None:
    data = bytearray(long_clip.read_bytes())
    with av.open(str(long_clip)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.pos is not None]
    for packet in packets[130:150]:
        data[packet.pos + 16 : packet.pos + packet.size] = bytes(packet.size - 16)
    broken = long_clip.with_name(f"broken{long_clip.suffix}")
    broken.write_bytes(data)
    assert numbers(read(broken, start=235, count=10)) == list(range(235, 245))
    with pytest.raises((VideoError, AssertionError)):
        assert numbers(read(broken, start=130, count=20)) == list(range(130, 150))


def test_untagged_hd_is_taken_for_bt_709(tmp_path: Path) -> None:
    image = np.zeros((720, 1280, 3), np.uint8)
    image[:] = (200, 60, 30)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    frame = frame.reformat(format="yuv444p", dst_colorspace=Colorspace.ITU709)
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv444p"
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert np.abs(read(tmp_path / "clip.mkv").frames_THWC[0, 9, 9].astype(int) - (200, 60, 30)).max() <= 3
