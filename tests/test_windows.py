"""Windows of long clips: coverage, overlap, and time linear in the number of frames."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import image_unet
from tests.shared.tuning import tuning
from tuneavideo.config import checked
from tuneavideo.errors import SettingsError
from tuneavideo.method.inflate import VideoUNet, inflate
from tuneavideo.method.windows import WindowedUNet, Windows
from tuneavideo.settings import TuneSettings

TEXT = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def video() -> VideoUNet:
    """An inflated UNet whose temporal attention is not idle."""
    video = inflate(image_unet())
    torch.manual_seed(3)
    for name, parameter in video.unet.named_parameters():
        if "attn_temp.to_out" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    video.unet.requires_grad_(False)
    return video


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Windows, int, float]:
    size = draw(st.integers(2, 20))
    return (
        Windows(size, draw(st.integers(0, size - 2)), draw(st.booleans())),
        draw(st.integers(1, 150)),
        draw(st.floats(0, 1000)),
    )


@given(cuts())
def test_windows_cover_a_clip_in_order_and_their_weights_sum_to_one(cut: tuple[Windows, int, float]) -> None:
    windows, frames, t = cut
    spans, weights = windows.spans(frames, t), windows.weights(frames, t)
    if frames > windows.size:
        assert {len(span) for span in spans} == {windows.size - 1}
        assert spans[0].start == 1 and spans[-1].stop == frames
        steps = [b.start - a.start for a, b in itertools.pairwise(spans)]
        assert all(0 < step <= windows.size - 1 - windows.overlap for step in steps)
    sums = [0.0] * frames
    for span, own in zip(spans, weights, strict=True):
        assert all(0 < share <= 1 for share in own)
        for frame, share in zip(span, own, strict=True):
            sums[frame] += share
    assert sums[1:] == pytest.approx([1.0] * (frames - 1))


@given(st.integers(4, 20), st.integers(21, 400), st.floats(0, 1000))
def test_the_number_of_windows_is_linear_in_frames(size: int, frames: int, t: float) -> None:
    windows = Windows(size, size // 3)
    wished = (frames - size) / (size - 1 - size // 3) + 1
    assert wished <= len(windows.spans(frames, t)) < wished + 2


def test_windows_that_hold_the_clip_are_the_plain_unet_bit_for_bit(video: VideoUNet) -> None:
    x, t = torch.randn(2, 4, 6, 8, 8), torch.tensor(400)
    for size in (6, 9):
        assert torch.equal(WindowedUNet(video, Windows(size, 2))(x, t, TEXT), video(x, t, TEXT))


def test_a_still_clip_in_windows_is_denoised_like_the_still_image() -> None:
    video, image = inflate(image_unet()), image_unet()
    still, t = torch.randn(2, 4, 1, 8, 8), torch.tensor(400)
    with torch.no_grad():
        expected = image(still[:, :, 0], t, TEXT).sample
        output = WindowedUNet(video, Windows(5, 2))(still.expand(-1, -1, 13, -1, -1), t, TEXT)
    for frame in output.unbind(2):
        assert torch.allclose(frame, expected, atol=1e-5)


def test_the_first_frame_stands_in_front_of_every_window(video: VideoUNet) -> None:
    """So a change of it reaches the last window; one of another frame reaches no window that does not hold it."""
    windowed, t = WindowedUNet(video, Windows(5, 2, moving=False)), torch.tensor(400)
    x = torch.randn(1, 4, 20, 8, 8)
    before = windowed(x, t, TEXT[:1])
    for frame, reaches in ((0, True), (5, False)):
        changed = x.clone()
        changed[:, :, frame] += 1
        assert (windowed(changed, t, TEXT[:1])[:, :, -1] != before[:, :, -1]).any() == reaches


def test_where_windows_overlap_predictions_are_blended(video: VideoUNet) -> None:
    """Written out plainly: every window's prediction, laid down with its weights."""
    windows, t, x = Windows(6, 3), torch.tensor(417), torch.randn(2, 4, 17, 8, 8)
    expected = torch.zeros_like(x)
    for span, weights in zip(windows.spans(17, 417.0), windows.weights(17, 417.0), strict=True):
        output = video(x[:, :, [0, *span]], t, TEXT)
        if span.start == 1:
            expected[:, :, 0] = output[:, :, 0]
        for place, (frame, share) in enumerate(zip(span, weights, strict=True), start=1):
            expected[:, :, frame] += share * output[:, :, place]
    assert torch.allclose(WindowedUNet(video, windows)(x, t, TEXT), expected, atol=1e-6)


def test_windows_move_from_step_to_step_and_lie_alike_in_both_halves_of_guidance() -> None:
    windows = Windows(8, 2)
    places = {tuple(span.start for span in windows.spans(60, float(t))) for t in range(19, 1000, 20)}
    assert len(places) == 5
    assert windows.spans(60, 419.0) == windows.spans(60, 419.0)


@dataclass
class Counting:
    """A UNet that predicts nothing and notes how many frames it was called with."""

    calls: list[int] = field(default_factory=list)

    def __call__(self, x: torch.Tensor, *_) -> torch.Tensor:
        self.calls.append(x.shape[2])
        return x


def test_every_call_of_the_unet_sees_one_window() -> None:
    unet, x = Counting(), torch.randn(1, 1, 1000, 1, 1)
    output = WindowedUNet(unet, Windows(16, 5))(x, torch.tensor(3), TEXT)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(output, x)
    assert set(unet.calls) == {16} and 98 < len(unet.calls) < 102


# Tuning


def long_tuning(**changes):
    return tuning(frames=20, window=6, max_train_steps=4, **changes)


def test_tuning_draws_windows_of_one_size_each_behind_the_first_frame() -> None:
    """Rising, and with one gap at most: behind the first frame, or where a window goes on at the other end."""
    work = long_tuning()
    for number in range(50):
        work.number = number
        frames = work._window(work._generator(0, 0))
        assert isinstance(frames, list) and frames[0] == 0 and len(frames) == 6 and frames[-1] < 20
        steps = [b - a for a, b in itertools.pairwise(frames)]
        assert min(steps) == 1 and sum(step > 1 for step in steps) <= 1
    clean, noise, _ = work.draw(0)
    assert clean.shape == noise.shape == (1, 4, 6, 8, 8)


@pytest.mark.parametrize(("frames", "window"), [(20, 6), (24, 14), (9, 8), (40, 2), (60, 16)])
def test_tuning_sees_every_frame_but_the_first_equally_often(frames: int, window: int) -> None:
    work, draws = tuning(frames=frames, window=window), 2000
    counts = [0] * frames
    for number in range(draws):
        work.number = number
        for frame in work._window(work._generator(0, 0)):  # pyright: ignore[reportGeneralTypeIssues]
            counts[frame] += 1
    mean = draws * (window - 1) / (frames - 1)
    spread = 4 / mean**0.5  # four standard deviations of a count, for windows of one frame
    assert counts[0] == draws
    assert all(abs(count / mean - 1) < max(0.2, spread) for count in counts[1:])


def test_a_tuning_in_windows_that_is_broken_off_goes_on_bit_for_bit() -> None:
    whole, broken, resumed = long_tuning(), long_tuning(), long_tuning()
    told = [step.loss for step in whole]
    first = [next(iter(broken)).loss for _ in range(2)]
    resumed.load_state(broken.state())
    assert first + [step.loss for step in resumed] == told
    assert all(torch.equal(value, resumed.learned()[name]) for name, value in whole.learned().items())


def test_a_clip_that_one_window_holds_is_tuned_as_without_windows() -> None:
    assert [step.loss for step in tuning(window=3)] == [step.loss for step in tuning()]


def test_windows_that_would_not_advance_are_refused() -> None:
    stated = {"video": "a.mp4", "prompt": "a", "window": 8, "window_overlap": 7}
    with pytest.raises(SettingsError, match="window_overlap 7: windows of 8 frames, .* can share at most 6"):
        checked(TuneSettings, stated)
