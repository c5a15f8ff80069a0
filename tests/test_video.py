"""Every clip here shows its frame numbers as brightness: frame n is grey, STEP * n + 10."""

import itertools
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tuneavideo import miniature
from tuneavideo.errors import DiskError, VideoError
from tuneavideo.video import Fit, Video, VideoStream, area_size, read, resize, write, write_frames, write_image
from tuneavideo.video.montage import contact_sheet, side_by_side

STEP = 20
ENCODERS = {"mp4": "libx264", "mov": "mpeg4", "mkv": "libx264", "avi": "mpeg4", "webm": "libvpx"}


def numbered(frames: int = 10, *, height: int = 48, width: int = 64, fps: float = 10) -> Video:
    greys = np.arange(frames, dtype=np.uint8) * STEP + 10
    return Video(np.broadcast_to(greys[:, None, None, None], (frames, height, width, 3)).copy(), fps)


def numbers(video: Video) -> list[int]:
    return [round((frame.mean() - 10) / STEP) for frame in video.frames_THWC]


def quadrants(height: int, width: int) -> np.ndarray:
    """A picture with red, green / blue, white corners, H W C."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = 255, 0, 0
    image[: height // 2, width // 2 :] = 0, 255, 0
    image[height // 2 :, : width // 2] = 0, 0, 255
    image[height // 2 :, width // 2 :] = 255, 255, 255
    return image


def corners(image: np.ndarray) -> str:
    """The colours a quarter in from each corner, row by row, as letters."""
    names = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W", (0, 0, 0): "K"}
    height, width = image.shape[:2]
    spots = itertools.product((height // 4, height * 3 // 4), (width // 4, width * 3 // 4))
    return "".join(names[tuple(int(value > 127) for value in image[spot])] for spot in spots)


def encoded(path: Path, video: Video, *, rate: Fraction | int = 10, rotation: int = 0) -> Path:
    """A file made by PyAV alone, not by the code under test."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(ENCODERS[path.suffix[1:]], rate=rate)
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in video.frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def animated(path: Path, video: Video) -> Path:
    images = [Image.fromarray(frame) for frame in video.frames_THWC]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / video.fps), loop=0)
    return path


def drawn(folder: Path, video: Video, names: list[str]) -> Path:
    folder.mkdir()
    for frame, name in zip(video.frames_THWC, names, strict=True):
        Image.fromarray(frame).save(folder / name)
    return folder


def whole(clip: VideoStream) -> Video:
    return Video(np.stack(list(clip.images)), clip.fps, clip.sound_SC)


def line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module", params=[*ENCODERS, "gif", "webp", "folder"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten numbered frames, 10 a second (8 for the folder, which cannot say), in every kind of source."""
    folder, kind = tmp_path_factory.mktemp("source"), request.param
    if kind == "folder":
        return drawn(folder / "clip", numbered(), [f"{n}.png" for n in range(10)])
    return (encoded if kind in ENCODERS else animated)(folder / f"clip.{kind}", numbered())


# Reading


def test_every_kind_of_source_gives_all_its_frames_at_its_rate(source):
    video = read(source)
    assert numbers(video) == list(range(10))
    assert (video.width, video.height) == (64, 48)
    assert video.fps == pytest.approx(8 if source.is_dir() else 10)


@pytest.mark.parametrize(
    ("start", "stride", "count", "expected"),
    [(0, 1, 3, [0, 1, 2]), (2, 3, 3, [2, 5, 8]), (1, 4, None, [1, 5, 9]), (9, 5, 1, [9]), (0, 9, 2, [0, 9])],
)
def test_the_frames_read_are_start_plus_multiples_of_the_stride(source, start, stride, count, expected):
    video = read(source, start=start, stride=stride, count=count)
    assert numbers(video) == expected
    assert video.fps == pytest.approx((8 if source.is_dir() else 10) / stride)


def test_too_few_frames_are_refused_with_numbers_and_advice(source):
    with pytest.raises(VideoError) as error:
        read(source, stride=4, count=4)
    expected = f"{source} has 10 frames; 4 frames, every 4 from 0, need 13; take 3 frames, or every 3"
    assert line(error) == expected
    assert read(source, stride=4, count=3).frames == 3
    assert read(source, stride=3, count=4).frames == 4


def test_when_no_stride_would_do_only_fewer_frames_are_advised(source):
    with pytest.raises(VideoError) as error:
        read(source, start=9, count=2)
    assert line(error).endswith("has 10 frames; 2 frames, every 1 from 9, need 11; take 1 frame")


@pytest.mark.parametrize("count", [None, 2])
def test_a_start_beyond_the_end_is_refused(source, count):
    with pytest.raises(VideoError) as error:
        read(source, start=10, count=count)
    assert line(error) == f"{source} has 10 frames; none from 10; start at 9 or before"


@pytest.mark.parametrize("wrong", [{"start": -1}, {"stride": 0}, {"count": 0}])
def test_an_invalid_choice_of_frames_is_refused(source, wrong):
    with pytest.raises(VideoError, match="start at 0 or later, take every 1 or more, at least 1 frame"):
        read(source, **wrong)


def test_decoding_stops_after_the_last_frame_needed(tmp_path):
    names = [f"{n}.png" for n in range(10)]
    folder = drawn(tmp_path / "clip", numbered(), names)
    (folder / "1.png").write_bytes(b"never read")
    (folder / "5.png").write_bytes(b"never reached")
    assert numbers(read(folder, stride=2, count=2)) == [0, 2]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(VideoError) as error:
        read(tmp_path / "gone.mp4")
    assert line(error).startswith(f"{tmp_path / 'gone.mp4'} does not exist; give mp4, mov")


@pytest.mark.parametrize("name", ["notes.mp4", "notes.webp", "empty.mp4", "empty.gif"])
def test_a_file_that_is_no_video_is_refused(tmp_path, name):
    (tmp_path / name).write_text("" if "empty" in name else "a man is skiing\n" * 50)
    with pytest.raises(VideoError) as error:
        read(tmp_path / name)
    assert line(error).startswith(f"{tmp_path / name} cannot be read as a video: ")


def test_a_damaged_file_is_refused(tmp_path):
    path = encoded(tmp_path / "clip.mp4", numbered())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(VideoError, match="cannot be read as a video"):
        read(path)


def test_a_file_with_sound_alone_is_refused(tmp_path):
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match=r"song\.mp4 holds no pictures, only sound"):
        read(tmp_path / "song.mp4")


def test_a_text_file_is_no_video(tmp_path):
    (tmp_path / "notes.txt").write_text("a man is skiing\n" * 50)
    with pytest.raises(VideoError, match=r"notes\.txt holds no pictures, only sound or text"):
        read(tmp_path / "notes.txt")


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no pictures")
    with pytest.raises(VideoError) as error:
        read(tmp_path)
    assert line(error).startswith(f"{tmp_path} has no frames; give ")


def test_images_are_read_in_natural_order(tmp_path):
    names = ["frame2.PNG", "frame9.jpg", "frame10.webp", "frame100.jpeg"]
    folder = drawn(tmp_path / "clip", numbered(4), names)
    (folder / "notes.txt").write_text("not a picture")
    (folder / "._frame1.png").write_text("left by macOS")
    video = read(folder, fps=12, stride=2)
    assert numbers(video) == [0, 2]
    assert video.fps == 6


def test_pictures_of_several_sizes_are_refused(tmp_path):
    folder = drawn(tmp_path / "clip", numbered(2), ["0.png", "1.png"])
    Image.new("RGB", (30, 20)).save(folder / "2.png")
    with pytest.raises(VideoError, match=r"found 64x48 \(0\.png\), 30x20 \(2\.png\); resize them"):
        read(folder)
    assert read(folder, count=2).frames == 2


def test_a_grey_or_transparent_picture_is_read_as_colours(tmp_path):
    Image.new("L", (8, 8), 70).save(tmp_path / "0.png")
    Image.new("RGBA", (8, 8), (70, 70, 70, 128)).save(tmp_path / "1.png")
    assert read(tmp_path).frames_THWC.shape == (2, 8, 8, 3)


@pytest.mark.parametrize(("rotation", "upright"), [(90, "GWRB"), (-90, "BRWG"), (180, "WBGR")])
def test_a_rotated_clip_is_read_upright(tmp_path, rotation, upright):
    lying = Video(np.stack([quadrants(32, 64)] * 2), 10)
    video = read(encoded(tmp_path / "phone.mp4", lying, rotation=rotation))
    assert (video.width, video.height) == ((64, 32) if rotation == 180 else (32, 64))
    assert corners(video.frames_THWC[0]) == upright


def test_a_name_like_a_protocol_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoded(tmp_path / "clip.mp4", numbered(2)).rename("12:30.mp4")
    assert read("12:30.mp4").frames == 2


# Size


def test_cropping_keeps_the_middle_undistorted():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = quadrants(40, 40)
    cropped = resize(image, 20, 20, "crop")
    assert cropped.shape == (20, 20, 3)
    assert corners(cropped) == "RGBW"
    assert (cropped.max(axis=-1) > 200).all(), "nothing of the black sides"


def test_stretching_keeps_everything():
    stretched = resize(quadrants(40, 80), 20, 30, "stretch")
    assert stretched.shape == (30, 20, 3)
    assert corners(stretched) == "RGBW"
    assert stretched[1, 1].tolist() == [255, 0, 0]


def test_padding_keeps_everything_undistorted_between_black_bars():
    padded = resize(quadrants(40, 80), 20, 30, "pad")
    assert padded.shape == (30, 20, 3)
    assert (padded[:10] == 0).all() and (padded[20:] == 0).all()
    assert corners(padded[10:20]) == "RGBW"


@pytest.mark.parametrize("how", get_args(Fit))
def test_fitting_to_its_own_size_changes_nothing(how):
    assert np.array_equal(resize(quadrants(31, 47), 47, 31, how), quadrants(31, 47))


def test_fine_stripes_shrink_to_grey_rather_than_to_other_stripes():
    stripes = np.zeros((96, 96, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(resize(stripes, 32, 32).astype(int) - 127).max() < 30


@pytest.mark.parametrize(("frames", "fps"), [(np.zeros((1, 8, 8, 3)), 8), (np.zeros((0, 8, 8, 3), np.uint8), 8)])
def test_a_clip_is_made_of_bytes_and_is_not_empty(frames, fps):
    with pytest.raises(AssertionError):
        Video(frames, fps)


sides = st.integers(16, 4000)


@given(sides, sides, st.integers(64, 1024), st.sampled_from([8, 16, 64]))
def test_the_chosen_size_is_of_multiples_and_no_neighbour_is_nearer(width, height, side, multiple):
    def error(w: int, h: int) -> float:
        return abs(np.log(w / h / (width / height))) + abs(np.log(w * h / side**2))

    chosen = area_size(width, height, area=side**2, multiple=multiple)
    assert all(edge % multiple == 0 and edge >= multiple for edge in chosen)
    steps = itertools.product((-multiple, 0, multiple), repeat=2)
    neighbours = [(chosen[0] + dw, chosen[1] + dh) for dw, dh in steps]
    assert error(*chosen) <= min(error(w, h) for w, h in neighbours if w > 0 and h > 0) + 1e-9


@given(sides, sides)
def test_a_clip_on_its_side_gets_the_size_on_its_side(width, height):
    upright = area_size(width, height, area=512**2, multiple=8)
    assert area_size(height, width, area=512**2, multiple=8) == upright[::-1]


def test_a_square_clip_gets_the_square_of_that_area():
    assert area_size(718, 718, area=512**2, multiple=8) == (512, 512)


# Writing


@pytest.mark.parametrize("name", ["clip.mp4", "clip.MP4", "clip.webm", "clip.gif", "clip", "clip.v2/"])
def test_what_is_written_is_read_again(tmp_path, name):
    path = f"{tmp_path}/new/folder/{name}"
    write(numbered(), path)
    video = read(path, fps=10)
    assert numbers(video) == list(range(10))
    assert (video.width, video.height, video.fps) == (64, 48, pytest.approx(10))
    assert len(list((tmp_path / "new/folder").iterdir())) == 1


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip"])
def test_colours_survive_writing(tmp_path, name):
    write(Video(np.stack([quadrants(64, 64) // 2 + 60] * 3), 10), tmp_path / name)
    difference = read(tmp_path / name).frames_THWC.astype(int) - (quadrants(64, 64) // 2 + 60)
    assert np.abs(difference[:, 16:64:32, 16:64:32]).max() <= 4


def test_mp4_names_its_colours_and_plays_while_it_loads(tmp_path):
    write(numbered(), tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt, codec.colorspace, codec.color_range) == ("h264", "yuv420p", 1, 1)
    file = (tmp_path / "clip.mp4").read_bytes()
    assert file.index(b"moov") < file.index(b"mdat")


@pytest.mark.parametrize(("name", "size"), [("a.mp4", (34, 52)), ("a.webm", (34, 52)), ("a.gif", (33, 51))])
def test_odd_sizes_can_be_written(tmp_path, name, size):
    write(numbered(3, width=33, height=51), tmp_path / name)
    video = read(tmp_path / name)
    assert (video.width, video.height) == size
    assert np.ptp(video.frames_THWC[2]) < 8, "the added edge repeats its neighbour"


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(30000, 7007), 8, 12.5, 60])
@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm"])
def test_the_rate_is_kept_to_a_thousandth(tmp_path, name, rate):
    write(numbered(fps=float(rate)), tmp_path / name)
    assert read(tmp_path / name).fps == pytest.approx(float(rate), rel=1e-3)


def test_mp4_keeps_the_rate_of_television_exactly(tmp_path):
    write(read(encoded(tmp_path / "a.mp4", numbered(), rate=Fraction(30000, 1001))), tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)


def test_a_gif_loops_and_keeps_time_and_still_frames(tmp_path):
    still = Video(np.repeat(numbered(2).frames_THWC, 12, axis=0), 24)
    write(still, tmp_path / "clip.gif")
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.info["loop"] == 0
    video = read(tmp_path / "clip.gif")
    assert video.frames == 24
    assert video.frames / video.fps == pytest.approx(1, abs=0.02)


def test_a_gif_faster_than_browsers_show_is_refused(tmp_path):
    with pytest.raises(VideoError, match="a GIF shows at most 50 frames a second, this clip has 60; write"):
        write(numbered(fps=60), tmp_path / "clip.gif")


def test_an_unknown_extension_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(VideoError) as error:
        write(numbered(), tmp_path / "clip.flv")
    expected = "found .flv, can write .mp4, .webm, .gif, or a folder if the name ends with /"
    assert line(error) == f"{tmp_path / 'clip.flv'}: {expected}"


def test_pngs_are_exact_and_replace_an_older_folder_of_frames(tmp_path):
    write_frames(numbered(5), tmp_path / "frames")
    noise = np.random.default_rng(0).integers(0, 256, (2, 9, 7, 3), np.uint8)
    write_frames(Video(noise, 10), tmp_path / "frames")
    assert [file.name for file in tmp_path.iterdir()] == ["frames"]
    assert sorted(file.name for file in (tmp_path / "frames").iterdir()) == ["00000.png", "00001.png"]
    assert np.array_equal(read(tmp_path / "frames").frames_THWC, noise)


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(VideoError, match=r"has more than frames in it: found thesis\.tex; choose another"):
        write_frames(numbered(2), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.webm", "clip.gif", "clip.png"])
def test_a_failed_write_leaves_nothing(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(DiskError) as error:
        write_image(quadrants(8, 8), tmp_path / name) if "png" in name else write(numbered(2), tmp_path / name)
    assert line(error).startswith(f"{tmp_path / name} cannot be written: ")
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip"])
def test_an_old_clip_stays_when_writing_is_interrupted(tmp_path, name, monkeypatch):
    write(numbered(2), tmp_path / name)
    calls = itertools.count()

    def interrupted(function):
        def call(*arguments):
            if next(calls) == 3:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image, "fromarray", interrupted(Image.fromarray))
        patch.setattr(np, "ascontiguousarray", interrupted(np.ascontiguousarray))
        write(numbered(9), tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert read(tmp_path / name).frames == 2


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot be written"):
        write(numbered(2), tmp_path / "file" / "clip.mp4")


# Side by side


def test_clips_stand_side_by_side_at_the_height_of_the_tallest():
    video = whole(side_by_side([numbered(2, height=200, width=300), numbered(3, height=400, width=100)]))
    assert video.frames_THWC.shape == (3, 400, 600 + 8 + 100, 3)
    assert (video.frames_THWC[:, :, 600:608] == 255).all()


def test_small_clips_are_enlarged_by_an_integer_factor():
    video = whole(side_by_side([numbered(2, height=64, width=64), numbered(2, height=64, width=80)]))
    assert (video.height, video.width) == (192, 192 + 8 + 240)


def test_a_clip_that_ends_early_repeats_its_last_frame_and_the_first_sets_the_rate():
    video = whole(side_by_side([numbered(3, fps=7), numbered(8, fps=30)]))
    left = Video(video.frames_THWC[:, :, :256], 7)
    right = Video(video.frames_THWC[:, :, 264:], 7)
    assert numbers(left) == [0, 1, 2, 2, 2, 2, 2, 2]
    assert numbers(right) == list(range(8))
    assert video.fps == 7


@pytest.mark.parametrize("text", ["source", "wide " * 100, "W" * 500, "a\nb", ""])
def test_labels_are_below_their_columns_and_do_not_overlap(text):
    plain = whole(side_by_side([numbered(2)] * 2))
    video = whole(side_by_side([numbered(2)] * 2, labels=[text, ""]))
    assert (video.frames, video.width) == (plain.frames, plain.width)
    assert np.array_equal(video.frames_THWC[:, : plain.height], plain.frames_THWC)
    band = video.frames_THWC[:, plain.height :]
    assert 0 < band.shape[1] < 90
    assert (band[:, :, :256].min() < 100) == bool(text)
    assert (band[:, :, 250:] == 255).all(), "even long lines end before the gap"


def test_each_clip_needs_its_label():
    with pytest.raises(ValueError, match="zip"):
        side_by_side([numbered()] * 2, labels=["one"])


def test_a_contact_sheet_has_a_row_for_each_clip_and_frames_from_first_to_last():
    sheet = contact_sheet([numbered(9), numbered(2, width=48)], ["long", "short"], columns=3)
    assert sheet.shape[1] == 3 * 256 + 2 * 8
    top = (sheet.shape[0] - 2 * 192) // 2
    cells = [sheet[top : top + 192, x : x + 256] for x in (0, 264, 528)]
    assert numbers(Video(np.stack(cells), 1)) == [0, 4, 8]
    assert (sheet[-192:, 3 * 192 + 2 * 8 :] == 255).all(), "a narrower row ends in paper"


def test_a_picture_is_written_exactly(tmp_path):
    write_image(quadrants(9, 7), tmp_path / "new" / "picture.png")
    with Image.open(tmp_path / "new" / "picture.png") as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(image), quadrants(9, 7))


def test_video_needs_no_torch():
    code = "import sys, tuneavideo.video; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_labels_do_not_touch_the_edge():
    clip = Video(np.full((1, 192, 192, 3), 255, np.uint8), 8)
    (frame,) = side_by_side([clip], labels=["WWWWWWWW " * 20]).images
    assert (frame[192:] < 128).any() and (frame[192:, :4] == 255).all() and (frame[192:, -4:] == 255).all()


def test_the_same_frames_are_encoded_alike_every_time(tmp_path: Path) -> None:
    clip = read(next(clip["path"] for clip in miniature.clips() if clip["name"] == "dog-jumping"), count=4, stride=4,
                size=(64, 64))  # fmt: skip
    for number in range(60):
        write(clip, tmp_path / f"{number}.mp4")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
