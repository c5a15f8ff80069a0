"""Written clips play in FFmpeg and Chromium with the right duration and with sound in time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from queue import Queue

import av
import numpy as np
import pytest

from tests.clips import clapped, encode
from tuneavideo.video import Video, read, write
from tuneavideo.video.montage import side_by_side

SOURCES = {
    "mp4 aac": ("mp4", "libx264", "aac", 44_100),
    "mov pcm": ("mov", "mpeg4", "pcm_s16le", 48_000),
    "mkv flac": ("mkv", "libx264", "flac", 96_000),
    "webm opus": ("webm", "libvpx", "libopus", 48_000),
    "avi pcm": ("avi", "mpeg4", "pcm_s16le", 22_050),
    "ts ac3": ("ts", "libx264", "ac3", 48_000),
}
SPANS = [{"start": 26, "count": 50}, {"start": 60, "stride": 2, "count": 16}, {"start_time": 1.4, "count": 40}]


def begins(times: np.ndarray, gap: float = 0.3) -> list[float]:
    """Return the first of each group of close times."""
    return [float(time) for time, before in zip(times, [-1, *times[:-1]], strict=True) if time - before > gap]


def claps(path: Path) -> tuple[list[float], list[float]]:
    """Return the seconds at which flashes and clicks begin, in the file's own time."""
    with av.open(str(path)) as container:
        flashes = [frame.time for frame in container.decode(video=0) if frame.to_ndarray(format="gray").mean() > 127]
    resampler, loud = av.AudioResampler("s16", "mono", 48_000), []
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            for part in resampler.resample(frame):
                (samples,) = np.abs(part.to_ndarray().astype(int))
                loud.append(part.time + np.flatnonzero(samples > 6000) / 48_000)
    return begins(np.array(flashes)), begins(np.concatenate(loud))


@pytest.mark.parametrize("kind", SOURCES)
def test_the_sound_of_the_span_that_was_taken_is_in_time(kind: str, tmp_path: Path) -> None:
    suffix, *codecs = SOURCES[kind]
    path = clapped(tmp_path / f"source.{suffix}", *codecs)
    for choice in SPANS:
        video = read(path, **choice)
        assert video.sound_SC is not None and len(video.sound_SC) == round(video.frames / video.fps * 48_000)
        lit = np.flatnonzero(video.frames_THWC.mean(axis=(1, 2, 3)) > 127) / video.fps
        loud = np.flatnonzero(np.abs(video.sound_SC[:, 0].astype(int)) > 6000) / 48_000
        assert begins(loud) == pytest.approx(begins(lit), abs=0.02)
        assert len(begins(loud)) >= 1


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
@pytest.mark.parametrize(("stride", "count"), [(1, 72), (2, 36), (3, 24)])
def test_a_written_clip_lasts_as_long_as_it_should_with_its_sound_in_time(
    suffix: str, stride: int, count: int, tmp_path: Path
) -> None:
    source = clapped(tmp_path / "source.mp4", "libx264", "aac", 44_100, channels=2)
    video = read(source, start=12, stride=stride, count=count)
    write(video, tmp_path / f"edit.{suffix}")
    flashes, clicks = claps(tmp_path / f"edit.{suffix}")
    assert flashes == pytest.approx([0, 0.96, 1.92], abs=1e-3)
    assert clicks == pytest.approx(flashes, abs=0.02)
    with av.open(str(tmp_path / f"edit.{suffix}")) as container:
        assert container.duration / 1e6 == pytest.approx(count * stride / 25, abs=stride / 25)
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([t * stride / 25 for t in range(count)], abs=1e-3)
    again = read(tmp_path / f"edit.{suffix}")
    assert (again.frames, again.fps) == (count, pytest.approx(25 / stride))
    assert again.sound_SC is not None and video.sound_SC is not None
    assert again.sound_SC.shape == video.sound_SC.shape


def test_a_silent_clip_stays_silent_and_a_gif_is_always(tmp_path: Path) -> None:
    source = clapped(tmp_path / "source.mp4", "libx264", "aac", 48_000)
    write(read(source, count=5), tmp_path / "clip.gif")
    write(read(tmp_path / "clip.gif"), tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert not container.streams.audio
    assert read(tmp_path / "clip.mp4").sound_SC is None


def test_sound_that_ends_early_is_followed_by_silence(tmp_path: Path) -> None:
    sound = ("aac", np.sin(np.arange(24_000) / 10)[:, None], 48_000)
    path = encode(tmp_path / "clip.mp4", [np.zeros((32, 32, 3), np.uint8)] * 30, sound=sound)
    samples = read(path).sound_SC
    assert samples is not None and len(samples) == 3 * 48_000
    assert np.abs(samples[:20_000]).max() > 10_000 and np.abs(samples[30_000:]).max() == 0
    assert read(path, start=20, count=10).sound_SC is None, "there is no sound"


def test_sound_that_cannot_be_decoded_is_left_out_with_a_warning(tmp_path: Path) -> None:
    path = clapped(tmp_path / "clip.mkv", "libx264", "flac", 48_000)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.pos is not None]
    data = bytearray(path.read_bytes())
    for packet in packets[2:40]:
        data[packet.pos + 16 : packet.pos + packet.size] = bytes(len(data[packet.pos + 16 : packet.pos + packet.size]))
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"clip\.mkv: its sound cannot be read .*; it is taken as silent"):
        assert read(path).sound_SC is None


# Chromium

PAGE = """<script>
function report(name) {
  return new Promise(done => {
    const video = document.createElement('video');
    const tell = event => done([name, {event, duration: video.duration, width: video.videoWidth,
      height: video.videoHeight, error: video.error && video.error.message, at: video.currentTime,
      frames: video.getVideoPlaybackQuality().totalVideoFrames, sound: video.webkitAudioDecodedByteCount}]);
    video.onended = () => tell('ended');
    video.onerror = () => tell('error');
    video.src = name;
    document.body.append(video);
    video.play().catch(error => tell(String(error)));
  });
}
onload = async () => {
  const all = [];
  for (const name of NAMES) all.push(await report(name));
  await fetch('/report', {method: 'POST', body: JSON.stringify(Object.fromEntries(all))});
};
</script><body>"""


class _Host(SimpleHTTPRequestHandler):
    """Server of a folder that stores the reports of the page."""

    def __init__(self, report: Queue, *arguments, **more) -> None:
        self.report = report
        super().__init__(*arguments, **more)

    def do_POST(self) -> None:
        self.report.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


def played(folder: Path, names: list[str], profile: Path) -> dict[str, dict]:
    """Return Chromium's report on the clips of a folder, each played to its end."""
    (folder / "page.html").write_text(PAGE.replace("NAMES", json.dumps(names)))
    report: Queue = Queue()
    server = HTTPServer(("127.0.0.1", 0), partial(_Host, report, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--mute-audio", f"--user-data-dir={profile}"]
    flags.append("--autoplay-policy=no-user-gesture-required")
    address = f"http://127.0.0.1:{server.server_port}/page.html"
    browser = subprocess.Popen(
        ["chromium", *flags, address],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        return report.get(timeout=90)
    finally:
        browser.kill()
        browser.wait()
        server.shutdown()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_what_is_written_plays_in_chromium(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    source = read(clapped(tmp_path / "source.mp4", "libx264", "aac", 44_100), start=12, count=25)
    write(source, folder / "edit.mp4")
    write(source, folder / "edit.webm")
    write(side_by_side([source, source], labels=["one", "two"]), folder / "side-by-side.mp4")
    write(Video(source.frames_THWC[:9, :47, :63], 8), folder / "silent.mp4")
    sizes = {"edit.mp4": (64, 48), "edit.webm": (64, 48), "side-by-side.mp4": (520, 222), "silent.mp4": (64, 48)}
    report = played(folder, list(sizes), tmp_path / "profile")
    for name, (width, height) in sizes.items():
        seconds, tick = (9 / 8, 1 / 8) if name == "silent.mp4" else (1, 1 / 25)
        assert report[name]["event"] == "ended" and report[name]["error"] is None
        assert report[name]["duration"] == pytest.approx(seconds, abs=tick)
        assert (report[name]["width"], report[name]["height"]) == (width, height)
        assert (report[name]["sound"] > 0) == (name != "silent.mp4")


# Memory

MEASURED = """
import sys
from pathlib import Path
import numpy as np
from tuneavideo.video import VideoStream, read, write

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) // 1024

before = status("VmRSS")
{work}
print(status("VmHWM") - before)
"""


def peak_mb(work: str) -> int:
    """Return the peak memory of a fresh process minus that of its imports, in megabytes."""
    code = MEASURED.format(work=work)
    return int(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")


def repeated(path: Path, times: int) -> Path:
    """Repeat a video many times without encoding it again."""
    long = path.with_name(f"long-{path.name}")
    with av.open(str(path)) as source, av.open(str(long), "w") as container:
        picture = source.streams.video[0]
        stream = container.add_stream_from_template(picture)
        packets = [packet for packet in source.demux(picture) if packet.dts is not None]
        length = round(len(packets) / picture.average_rate / picture.time_base)
        for turn in range(times):
            with av.open(str(path)) as again:
                for packet in again.demux(video=0):
                    if packet.dts is not None:
                        packet.pts, packet.dts = packet.pts + turn * length, packet.dts + turn * length
                        packet.stream = stream
                        container.mux(packet)
    return long


@needs_proc
def test_eight_of_two_thousand_frames_of_720p_take_little_memory(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (10, 9, 16, 3), np.uint8)
    images = [np.kron(image, np.ones((80, 80, 1), np.uint8)) for image in noise]
    path = repeated(encode(tmp_path / "clip.mp4", images, rate=25, options={"preset": "ultrafast"}), 200)
    work = f"assert read({str(path)!r}, stride=285, count=8).frames_THWC.shape == (8, 720, 1280, 3)"
    assert peak_mb(work) <= 300


@needs_proc
@pytest.mark.parametrize("suffix", ["mp4", "gif"])
def test_a_thousand_frames_are_written_as_they_come(suffix: str, tmp_path: Path) -> None:
    path = str(tmp_path / f"clip.{suffix}")
    work = f"write(VideoStream((np.full((240, 320, 3), t % 250, np.uint8) for t in range(1000)), 25.0), {path!r})"
    assert peak_mb(work) <= 120, "all of them are 230 MB"
    with av.open(path) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 1000
