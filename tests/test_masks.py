"""What is true of edits inside a mask."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Said, moving_square
from tuneavideo import TuneAVideoPipeline, api, miniature
from tuneavideo.errors import SettingsError, VideoError
from tuneavideo.method.sampling import mix_noise
from tuneavideo.video import Video, read, resize
from tuneavideo.video.masks import Mask

SIDE, INSIDE = 16, np.zeros((16, 16), bool)
INSIDE[4:13, :9] = True  # its edge is not one of latents, which are 2 x 2 pixels


def mask_file(path: Path, inside: np.ndarray) -> Path:
    Image.fromarray(inside.astype(np.uint8) * 255).save(path)
    return path


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip with an edit without tuning."""
    folder = tmp_path_factory.mktemp("runs")
    own = {"base": str(base), "num_frames": 3, "num_inference_steps": 4, "mixed_precision": "no", "progress": False}
    clip = moving_square(folder / "square.mp4")
    api.edit(clip, "a circle", source_prompt="a square", out=folder / "run", **own)
    return folder / "run"


@pytest.mark.parametrize("settings", [{}, {"attention_injection": 0.0}, {"fresh_noise": 0.9, "strength": 0.5}])
def test_pixels_outside_the_mask_stay(settings: dict, run: Path, tmp_path: Path) -> None:
    mask = str(mask_file(tmp_path / "mask.png", INSIDE))
    [folder] = api.edit(run, "a blue circle", mask=mask, formats=("frames",), progress=False, **settings)
    edit, source = read(folder / "frames").frames_THWC, read(run / "source.mp4").frames_THWC
    assert np.array_equal(edit[:, ~INSIDE], source[:, ~INSIDE])
    assert np.abs(edit[:, INSIDE].astype(int) - source[:, INSIDE]).mean() > 5
    assert json.loads((folder / "edit.json").read_text())["mask"] == mask


@pytest.mark.parametrize("sampler", ["ddim", "dpm++", "unipc", "deis", "euler", "euler-ancestral"])
def test_latents_outside_the_mask_are_the_clips_at_every_step(sampler: str, base: Path) -> None:
    pipe = TuneAVideoPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    clip = Video(np.random.default_rng(0).integers(0, 255, (3, SIDE, SIDE, 3), np.uint8), 8.0)
    inverted = pipe.invert(clip, 4, timestep_spacing="trailing")
    outside = torch.from_numpy(Mask(clip, INSIDE[None]).fractions(8, 8) == 0)[0]
    seen = []

    def callback(_pipe, _index, _timestep, values):
        seen.append(values["latents"][..., outside])
        return {}

    settings = {"num_inference_steps": 4, "sampler": sampler, "timestep_spacing": "trailing", "fresh_noise": 0.5}
    pipe("a circle", latents=inverted, mask=INSIDE, callback_on_step_end=callback, output_type="latent", **settings)
    latents = inverted.trajectory.latents[:, :, :, outside][:, None]
    assert torch.equal(seen[-1], latents[-1])
    for step, source in zip(seen[:-1], latents[1:-1], strict=True):
        scale = (step / source).median()  # Euler does not scale the signal down
        assert torch.allclose(step, source * scale, rtol=1e-4, atol=1e-5)
        assert scale > 1 if sampler.startswith("euler") else scale == 1


def test_fresh_noise_is_inside_the_mask() -> None:
    inverted, clean = torch.randn(2, 1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 1, 8, 8)
    mask[..., :4] = 1
    mixed = mix_noise(inverted, clean, 0.3, 0.9 * mask, torch.Generator().manual_seed(1))
    whole = mix_noise(inverted, clean, 0.3, 0.9, torch.Generator().manual_seed(1))
    assert torch.allclose(mixed[..., 4:], inverted[..., 4:], atol=1e-5)
    assert torch.allclose(mixed[..., :4], whole[..., :4], atol=1e-5)


def test_the_edge_is_soft_and_inside() -> None:
    video = Video(np.zeros((2, SIDE, SIDE, 3), np.uint8), 8.0)
    first, second = Mask(video, INSIDE[None]).weights(4)
    assert np.array_equal(first, second) and not first[~INSIDE].any()
    assert first[8, :9].tolist() == [1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert Mask(video, np.ones((1, SIDE, SIDE), bool)).fractions(8, 8).min() == 1
    fractions = Mask(video, INSIDE[None]).fractions(8, 8)
    assert fractions.shape == (1, 8, 8) and fractions[0, 3].tolist() == [1, 1, 1, 1, 0.5, 0, 0, 0]


def test_mistakes_are_one_line(run: Path, refused: Said, tmp_path: Path) -> None:
    mask = str(mask_file(tmp_path / "mask.png", INSIDE))
    edit = ["edit", str(run), "--prompt", "a circle", "--mask"]
    assert "does not exist" in refused([*edit, "no.png"])
    free = ["--attention-injection", "0"]
    assert "mask does not work with sampler plms" in refused([*edit, mask, *free, "--sampler", "plms"])
    assert "mask needs one inversion step" in refused([*edit, mask, *free, "--num-inv-steps", "3"])
    mask_file(tmp_path / "dark.png", INSIDE & False)
    assert "make bright what may" in refused([*edit, str(tmp_path / "dark.png")])
    mask_file(tmp_path / "bright.png", INSIDE | True)
    assert "nothing is background" in refused([*edit, str(tmp_path / "bright.png")])


def test_the_pipeline_takes_masks_of_the_clips_shape_only(base: Path) -> None:
    pipe = TuneAVideoPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    clip = Video(np.zeros((3, SIDE, SIDE, 3), np.uint8), 8.0)
    with pytest.raises(SettingsError, match="mask needs an inverted clip"):
        pipe("a circle", mask=INSIDE, num_frames=3)
    inverted = pipe.invert(clip, 2)
    with pytest.raises(ValueError, match="mask: expected"):
        pipe("a circle", latents=inverted, mask=np.ones((2, SIDE, SIDE), bool), num_inference_steps=2)


def test_the_background_of_a_miniature_edit_stays(tmp_path: Path) -> None:
    """With a mask for each frame, around the subject; at least 34 dB outside, in the mp4 file."""
    clip = miniature.clips()[0]
    (tmp_path / "masks").mkdir()
    rows, columns = np.mgrid[:64, :64]
    for number, (x, y) in enumerate(clip["track"][::2]):
        inside = np.maximum(abs(columns - x), abs(rows - y)) < 18
        mask_file(tmp_path / f"masks/{number:02}.png", resize_mask(inside))
    own = {"source_prompt": clip["caption"], "stride": 2, "num_inference_steps": 5, "fresh_noise": 0.5}
    prompt, mask = clip["edits"][0]["prompt"], tmp_path / "masks"
    out = {"out": tmp_path / "run", "mixed_precision": "no", "progress": False}
    api.edit(clip["path"], prompt, mask=str(mask), **own, **out)
    [file] = api.evaluate(tmp_path / "run", metrics=["background_psnr"], mask=mask, progress=False)
    [edit] = json.loads(file.read_text())["edits"]
    assert edit["scores"]["background_psnr"]["value"] >= 34


def resize_mask(inside: np.ndarray) -> np.ndarray:
    """Enlarge a mask, which a run reduces to its size again."""
    return resize(np.repeat(inside[..., None], 3, 2).astype(np.uint8) * 255, 128, 128)[..., 0] >= 128


def test_a_mask_of_another_length_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    for number in range(2):
        mask_file(tmp_path / f"masks/{number}.png", INSIDE)
    with pytest.raises(VideoError, match="expected 1 frame or 3"):
        api.edit(run, "a circle", mask=str(tmp_path / "masks"), progress=False)


def test_keep_changes_what_the_prompt_changes_only(tmp_path: Path) -> None:
    """Another subject leaves most of the background, another background the subject's own pixels."""
    clip = next(clip for clip in miniature.clips() if clip["name"] == "dog-jumping")
    own = {"source_prompt": clip["caption"], "keep": True, "num_frames": 4, "num_inference_steps": 10}
    prompts = [edit["prompt"] for edit in clip["edits"] if edit["kind"] in ("subject", "background")]
    folders = api.edit(clip["path"], prompts, out=tmp_path / "run", formats=("frames",), progress=False, **own)
    source = read(tmp_path / "run" / "source.mp4").frames_THWC
    subject, background = (read(folder / "frames").frames_THWC.astype(int) for folder in folders)
    track = clip["track"][: 4 * 4 : 4]
    squares = np.zeros(source.shape[:3], bool)
    for frame, (x, y) in zip(squares, track, strict=True):
        frame[max(0, round(y) - 6) : round(y) + 6, max(0, round(x) - 6) : round(x) + 6] = True
    kept = np.abs(subject - source).max(axis=3) == 0
    assert kept.mean() > 0.25
    assert kept[squares].mean() < 0.1
    kept = np.abs(background - source).max(axis=3) == 0
    assert kept[squares].mean() > 0.5 > kept[~squares].mean()
