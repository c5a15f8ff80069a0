"""Selection and resizing of frames agree with a simple model; mistakes are one-line errors."""

from __future__ import annotations

import re
import struct
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.clips import animate, barcode, barcodes, encode, numbers
from tuneavideo.config import checked
from tuneavideo.errors import SettingsError, VideoError
from tuneavideo.settings import TuneSettings
from tuneavideo.video import area_size, choose_span, read, read_any, reading, resize

COUNT, RATE = 40, 20


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty frames in two seconds."""
    return encode(tmp_path_factory.mktemp("forty") / "clip.mp4", barcodes(COUNT, 32, 32), rate=RATE, options={"g": "5"})


whole = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@whole
@given(st.integers(0, 50), st.integers(1, 20), st.none() | st.integers(1, 30))
def test_frames_by_number_are_a_slice(forty: Path, start: int, stride: int, count: int | None) -> None:
    there = list(range(COUNT))[start::stride]
    if not there or (count and len(there) < count):
        with pytest.raises(VideoError, match=f"has {COUNT} frames; "):
            read(forty, start=start, stride=stride, count=count)
    else:
        video = read(forty, start=start, stride=stride, count=count)
        assert numbers(video) == there[:count]
        assert video.fps == pytest.approx(RATE / stride)


@whole
@given(st.floats(0, 2.2), st.floats(0.5, 60), st.none() | st.integers(1, 30))
@example(0.5, 10.0, 3)
def test_frames_by_seconds_are_those_shown_nearest(forty: Path, start: float, fps: float, count: int | None) -> None:
    moments = [start + number / fps for number in range(200)]
    there = [moment for moment in moments if moment + 0.5 / RATE < COUNT / RATE]
    assume(all(abs((m * RATE + 0.5) % 1 - 0.5) < 0.49 for m in moments if m < 3))  # where rounding may decide
    if not there or (count and len(there) < count):
        with pytest.raises(VideoError, match=f"has {COUNT} frames in 2 s; "):
            read(forty, start_time=start, sample_fps=fps, count=count)
    else:
        video = read(forty, start_time=start, sample_fps=fps, count=count)
        assert numbers(video) == [int(moment * RATE + 0.5) for moment in there[:count]]
        assert video.fps == pytest.approx(fps)


sides = st.integers(1, 300)


@given(sides, sides, sides, sides, st.sampled_from(["crop", "pad", "stretch"]))
def test_a_picture_fits_exactly(width: int, height: int, new_width: int, new_height: int, how) -> None:
    image = np.full((height, width, 3), 200, np.uint8)
    result = resize(image, new_width, new_height, how)
    assert result.shape == (new_height, new_width, 3) and result.dtype == np.uint8
    lit = (result == 200).all(axis=-1)
    if how == "pad":
        rows, columns = lit.any(axis=1).sum(), lit.any(axis=0).sum()
        assert rows == new_height or columns == new_width
        assert lit.sum() == rows * columns, "one whole rectangle between the bars"
        assert abs(rows - min(new_height, new_width * height / width)) <= 1
        assert abs(columns - min(new_width, new_height * width / height)) <= 1
    else:
        assert lit.all()


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(64, 1024), st.sampled_from([8, 16, 64]))
def test_the_size_of_an_area_is_near_it_and_keeps_the_shape(width: int, height: int, side: int, multiple: int) -> None:
    chosen = area_size(width, height, area=side**2, multiple=multiple)
    assert all(edge >= multiple and edge % multiple == 0 for edge in chosen)
    for edge, true in zip(chosen, (side * (width / height) ** 0.5, side * (height / width) ** 0.5), strict=True):
        assert edge == multiple or 0.5 <= edge / true <= 2
        assert abs(edge - true) <= multiple or true < multiple


# Mistakes


def refused(path: Path, **options) -> str:
    with pytest.raises(VideoError) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value).replace(str(path), "CLIP")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 40}, "CLIP has 40 frames; none from 40; start at 39 or before"),
        ({"start": 4000}, "CLIP has 40 frames; none from 4000; start at 39 or before"),
        ({"stride": 3, "count": 15},
         "CLIP has 40 frames; 15 frames, every 3 from 0, need 43; take 14 frames, or every 2"),
        ({"start_time": 9}, "CLIP has 40 frames in 2 s; none from 9 s; start at 1.95 s or before"),
        (
            {"start_time": 1, "sample_fps": 10, "count": 12},
            "CLIP has 40 frames in 2 s; 12 frames, 10 a second from 1 s, need 2.15 s; take 10 frames",
        ),
        ({"start": 3, "start_time": 1.0}, "CLIP: give start or start_time, stride or sample_fps, not both"),
        ({"stride": 3, "sample_fps": 1.0}, "CLIP: give start or start_time, stride or sample_fps, not both"),
        (
            {"sample_fps": 0.0},
            "CLIP: found start_time None, sample_fps 0.0; start at 0 s or later, take more than 0 frames a second",
        ),
    ],
)  # fmt: skip
def test_missing_frames_are_refused_in_the_terms_of_the_request(forty, options, message) -> None:
    assert refused(forty, **options) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"start": 3, "start_time": 1}, "settings: start 3 and start_time 1 both"),
        ({"stride": 2, "sample_fps": 8}, "settings: stride 2 and sample_fps 8 both"),
    ],
)
def test_contradicting_options_are_refused(values, message) -> None:
    with pytest.raises(SettingsError) as error:
        checked(TuneSettings, {"video": "a.mp4", "prompt": "a man", **values})
    assert str(error.value).startswith(message)


def test_options_in_frames_and_in_seconds_can_be_mixed() -> None:
    checked(TuneSettings, {"video": "a.mp4", "prompt": "a man", "start": 3, "sample_fps": 8})
    checked(TuneSettings, {"video": "a.mp4", "prompt": "a man", "start_time": 3, "stride": 2})


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "avi", "gif", "webp"])
@pytest.mark.parametrize("content", [b"", b"a man is skiing\n" * 99, bytes(9999)])
def test_what_is_no_video_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip.{suffix}"
    path.write_bytes(content)
    message = refused(path)
    assert message.startswith("CLIP cannot be read as a video: ") or message.startswith("CLIP holds no pictures")
    assert message.endswith("; give mp4, mov, webm, mkv, avi, gif, webp or a folder of pictures")
    assert content or "it is empty (0 bytes)" in message


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv", "webm", "avi", "gif", "webp"])
def test_a_truncated_clip_is_read_as_far_as_it_goes_and_refused_beyond(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip.{suffix}"
    noise = np.random.default_rng(0).integers(0, 99, (30, 64, 96, 3), np.uint8)
    images = list(np.array(barcodes(30)) // 2 + noise)
    if suffix in ("gif", "webp"):
        animate(path, images)
    else:
        codec, pix_fmt = {"webm": ("libvpx", "yuv420p"), "avi": ("mjpeg", "yuvj420p")}.get(
            suffix, ("libx264", "yuv420p")
        )
        encode(path, images, codec, pix_fmt, file_options={"movflags": "+faststart"} if suffix == "mp4" else {})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    message = refused(path, count=30)
    if suffix in ("mov", "webp"):  # their tables are at the end, or nothing is decoded unless all is there
        assert message.startswith("CLIP cannot be read as a video: ")
        return
    assert numbers(read(path, count=8)) == list(range(8))
    there = r"CLIP has (\d+) frames(, though it says it lasts [23.]+ s)?; 30 frames, .* need 30; take \1 frames"
    assert re.fullmatch(there, message) or re.match(r"CLIP is damaged after \d\.\d+ s: ", message)


def test_a_damaged_frame_is_named_and_those_before_it_are_read(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mov", barcodes(10), "png", "rgb24")
    data = bytearray(path.read_bytes())
    places = [place for place in range(len(data)) if data.startswith(b"IDAT", place)]
    data[places[6] + 8 : places[6] + 40] = bytes(32)
    path.write_bytes(data)
    assert numbers(read(path, count=6)) == [0, 1, 2, 3, 4, 5]
    message = refused(path)
    assert message.startswith("CLIP is damaged after 0.50 s: ") and message.endswith(
        "repair it: ffmpeg -i clip.mov repaired.mp4"
    )


def test_frames_of_absurd_size_are_refused(tmp_path: Path) -> None:
    path = animate(tmp_path / "clip.gif", barcodes(2))
    data = bytearray(path.read_bytes())
    struct.pack_into("<HH", data, 6, 16_000, 9_000)
    path.write_bytes(data)
    most = "at most 67,108,864 pixels, such as 8192 x 8192, are read; scale it down first"
    assert refused(path) == f"CLIP has frames of 16000 x 9000; {most}"
    (tmp_path / "pictures").mkdir()
    Image.new("1", (8_200, 8_200)).save(tmp_path / "pictures" / "0.png")
    assert refused(tmp_path / "pictures") == f"CLIP/0.png has frames of 8200 x 8200; {most}"


def test_a_clip_too_large_for_memory_is_refused(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", [barcode(3, 1280, 720)] * 2, rate=Fraction(1, 500))
    taken = "3107 frames of 1280 x 720 take 8 GiB"
    message = refused(path, sample_fps=8.0)
    assert message == f"CLIP is more than is held in memory: {taken}; take fewer frames, or smaller ones"


def test_a_playlist_does_not_open_network_addresses(tmp_path: Path) -> None:
    opened = []

    class Host(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            opened.append(self.path)

    server = HTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = tmp_path / "clip.m3u8"
    part = f"http://127.0.0.1:{server.server_port}/part.ts"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{part}\n#EXT-X-ENDLIST\n")
    assert refused(path).startswith("CLIP ")
    server.shutdown()
    assert not opened


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"usual": 8}, (5, 8)),  # 0, 5, ... 35: all of two seconds
        ({"usual": 4}, (5, 4)),  # no further apart than a quarter of a second
        ({"usual": 24}, (1, 24)),
        ({"usual": 50}, (1, 40)),  # no count is given
        ({"usual": 24, "stride": 2}, (2, 20)),
        ({"usual": 24, "stride": 2, "start": 36}, (2, 2)),
        ({"usual": 8, "start": 25}, (2, 8)),
        ({"usual": 8, "start_time": 1.0}, (2, 8)),
        ({"usual": 24, "sample_fps": 10}, (None, 20)),
        ({"usual": 8, "count": 14}, (3, 14)),
        ({"usual": 8, "count": "all"}, (1, None)),
        ({"usual": 8, "count": "all", "stride": 4}, (4, None)),
    ],
)
def test_frames_are_spread_over_a_clip_by_default(forty: Path, options: dict, taken) -> None:
    span = choose_span(forty, **options)
    assert (span.stride, span.count, span.total, span.seconds) == (*taken, COUNT, COUNT / RATE)


@pytest.mark.parametrize("options", [{"count": 41}, {"count": 14, "stride": 4}, {"count": 3, "start": 38}])
def test_too_few_frames_are_refused_in_the_same_words_before_any_is_decoded(forty: Path, options: dict) -> None:
    with pytest.raises(VideoError) as error:
        choose_span(forty, usual=8, **options)
    assert str(error.value).replace(str(forty), "CLIP") == refused(forty, **options)


def test_images_of_a_folder_and_of_a_clip_without_rate_are_counted(tmp_path: Path) -> None:
    for number in range(20):
        Image.fromarray(barcodes(1)[0]).save(tmp_path / f"{number}.png")
    span = choose_span(tmp_path, usual=8)
    assert (span.stride, span.count, span.total, span.seconds) == (2, 8, 20, 2.5)
    webp = animate(tmp_path / "clip.webp", barcodes(9), 125)
    assert (choose_span(webp, usual=4).stride, choose_span(webp, usual=24).count) == (2, 9)


def test_a_long_clip_is_examined_only_as_far_as_needed(forty: Path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "SLOWEST", 40)
    span = choose_span(forty, usual=4)
    assert (span.stride, span.total) == (1, COUNT)  # the total is the file's word


def test_a_clip_of_varying_rate_is_measured_by_its_images(tmp_path: Path) -> None:
    times = [number / 30 for number in (*range(15), *range(15, 30, 3))]
    path = encode(tmp_path / "phone.mkv", barcodes(20), times=times)
    message = refused(path, count=500)
    assert re.match(
        r"CLIP has \d\d frames at a steady [\d.]+ a second \(20 of varying length in the file\); 500", message
    )


def test_a_folder_names_what_is_odd_about_its_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2, 5, 6, 9, 20):
        Image.fromarray(barcodes(1)[0]).save(tmp_path / f"f{number:03d}.png")
    assert read(tmp_path).frames == 6
    assert "no picture 3 to 4, 7 to 8, 10 to 19;" in caplog.text
    animate(tmp_path / "f021.webp", barcodes(3))
    assert "f021.webp moves" in refused(tmp_path)


def test_a_damaged_clip_gives_the_frames_before_if_fewer_are_allowed(tmp_path: Path, caplog) -> None:
    path = encode(tmp_path / "clip.mov", barcodes(10), "png", "rgb24")
    data = bytearray(path.read_bytes())
    places = [place for place in range(len(data)) if data.startswith(b"IDAT", place)]
    data[places[6] + 8 : places[6] + 40] = bytes(32)
    path.write_bytes(data)
    assert read_any(path, tmp_path, count=9, fewer=True).frames == 6
    assert "damaged after 0.50 s" in caplog.text
