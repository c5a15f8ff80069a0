"""The bundled model, its clips, and the method on a trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from tuneavideo import miniature
from tuneavideo.cli import main
from tuneavideo.method.inflate import video_unet
from tuneavideo.method.inversion import invert, path_to
from tuneavideo.method.noise import NoiseSchedule
from tuneavideo.method.sampling import generate
from tuneavideo.models import codec, pipelines
from tuneavideo.video import read


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return pipelines.load_pipeline("miniature")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_it_is_small_and_holds_no_pickles() -> None:
    files = [path for path in miniature.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert not {path.suffix for path in files} & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def test_stock_diffusers_opens_it_and_draws() -> None:
    stock = StableDiffusionPipeline.from_pretrained(miniature.MODEL)
    stock.set_progress_bar_config(disable=True)
    image = stock("a dog on the grass", num_inference_steps=2, guidance_scale=3.0).images[0]
    assert image.size == (64, 64)


def test_words_it_does_not_know_do_no_harm(pipe: StableDiffusionPipeline) -> None:
    known, strange = codec.embed(pipe, ["a dog", "spider man is skiing, 4K?"]).text_BLD
    assert known.isfinite().all() and strange.isfinite().all()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inversion_then_generation_returns_the_clip(spacing: str, pipe: StableDiffusionPipeline) -> None:
    clip = read(miniature.clips()[0]["path"], stride=4, count=3, size=(64, 64))
    clean, noise_schedule = codec.encode(pipe, clip)["mean"], NoiseSchedule.of(pipe.scheduler)
    empty, video = codec.embed(pipe, [""]), video_unet(pipe.unet)
    sampler = noise_schedule.sampler("ddim", 50, spacing=spacing)
    *_, up = invert(video, noise_schedule, clean, empty, path_to(sampler, noise_schedule, 50, spacing))
    *_, down = generate(video, sampler, up.latents, empty, empty, 1.0)
    (back,), (there,) = (codec.decode(pipe, latents, 8) for latents in (down.latents, clean))
    assert psnr(back.frames_THWC, there.frames_THWC) >= 30


def test_the_autoencoder_keeps_a_drawing(pipe: StableDiffusionPipeline) -> None:
    clip = read(miniature.clips()[0]["path"], count=2, size=(64, 64))
    (decoded,) = codec.decode(pipe, codec.encode(pipe, clip)["mean"], 8)
    assert psnr(decoded.frames_THWC, clip.frames_THWC) >= 24


def test_the_sample_clips_are_what_their_list_says() -> None:
    clips = miniature.clips()
    assert len(clips) == 24 and len({clip["name"] for clip in clips}) == 24
    assert [sum(clip["set"] == half for clip in clips) for half in ("development", "report")] == [12, 12]
    for clip in clips:
        assert read(clip["path"]).frames == len(clip["track"]) == 16
        assert [edit["kind"] for edit in clip["edits"]] == ["subject", "background", "style", "two"]
        assert np.ptp(np.array(clip["track"]), axis=0).max() >= 10


def test_the_harder_clips_are_what_their_list_says() -> None:
    clips = miniature.clips(harder=True)
    for part in ("harder", "harder-report"):
        assert [clip["challenge"] for clip in clips if clip["set"] == part] == [
            kind for kind in ("camera", "size", "occlusion", "long", "bystander") for _ in range(2)
        ]
    for clip in [*clips, *miniature.clips()]:
        frames = read(clip["path"]).frames
        true = read(clip["true_edits"])
        assert frames == true.frames == len(clip["track"]) == len(clip.get("camera", clip["track"]))
        assert (true.width, true.height) == (4 * 64, 64)
        assert clip.get("num_frames", 8) * clip.get("stride", 2) == frames


def test_the_demo_makes_its_edits_and_a_picture_of_them(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main.main(["demo", "--quick", "--out", str(tmp_path / "demo"), "--json"])
    assert (tmp_path / "demo/edits.png").is_file()
    assert len(list((tmp_path / "demo").glob("edits/*/side-by-side.mp4"))) == 4
    assert "edits.png" in capsys.readouterr().out


def test_tuning_learns_the_clip(pipe: StableDiffusionPipeline) -> None:
    """The tuned model predicts the noise of the clip better than the model it came from."""
    from accelerate import Accelerator

    from tuneavideo.config import checked, layers
    from tuneavideo.method.tuning import Tuning
    from tuneavideo.settings import TuneSettings
    from tuneavideo.training.optimizers import make_optimizer

    clip = read(miniature.clips()[0]["path"], stride=4, count=4, size=(64, 64))
    fresh = pipelines.load_pipeline("miniature")
    own = {"video": "-", "prompt": "-", "max_train_steps": 30, "num_frames": 4}
    settings = checked(TuneSettings, layers(own, {}))
    text = codec.embed(fresh, ["a dog is jumping on the grass"])
    tuning = Tuning(
        video_unet(fresh.unet), NoiseSchedule.of(fresh.scheduler), codec.encode(fresh, clip), text, settings,
        Accelerator(cpu=True), make_optimizer,
    )  # fmt: skip

    def loss() -> float:
        rng = torch.Generator().manual_seed(4)
        noise = torch.randn(8, *tuning.mean.shape[1:], generator=rng)
        with torch.no_grad():
            return float(tuning.loss(tuning.mean.expand_as(noise), noise, torch.arange(60, 940, 110)))

    before = loss()
    list(tuning)
    assert loss() < 0.97 * before
