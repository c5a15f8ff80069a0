"""What is true of the pipeline: it is a stock Stable Diffusion pipeline that sees clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from tests.conftest import image_unet, moving_square
from tests.test_adapter import learned
from tuneavideo import TuneAVideoPipeline, models
from tuneavideo.errors import AdapterError
from tuneavideo.video import Video, read

QUICK = {"num_frames": 3, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture
def pipe(base: Path) -> TuneAVideoPipeline:
    pipe = TuneAVideoPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("pil", lambda frames: len(frames) == 2 and len(frames[0]) == 3 and isinstance(frames[0][0], Image.Image)),
        ("np", lambda frames: frames.shape == (2, 3, 16, 16, 3) and frames.min() >= 0 and frames.max() <= 1),
        ("pt", lambda frames: frames.shape == (2, 3, 3, 16, 16)),
        ("latent", lambda frames: frames.shape == (2, 4, 3, 8, 8)),
    ],
)
def test_frames_come_in_the_types_of_diffusers(kind: str, check, pipe: TuneAVideoPipeline) -> None:
    made = pipe(["a square", "a circle"], generator=rng(), **QUICK | {"output_type": kind})
    assert check(made.frames)
    assert isinstance(pipe("a square", return_dict=False, **QUICK), tuple)


def test_the_same_generator_makes_the_same_clip(pipe: TuneAVideoPipeline) -> None:
    first, second = (pipe("a square", generator=rng(), **QUICK).frames for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, pipe("a circle", generator=rng(), **QUICK).frames)
    negative = pipe("a square", negative_prompt="red", generator=rng(), **QUICK).frames
    assert not torch.equal(first, negative)


def test_slicing_and_embeddings_change_nothing(pipe: TuneAVideoPipeline) -> None:
    whole = pipe("a square", generator=rng(), **QUICK).frames
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    text, empty = models.embed(pipe, ["a square", ""]).text_BLD.split(1)
    sliced = pipe(prompt_embeds=text, negative_prompt_embeds=empty, generator=rng(), **QUICK).frames
    assert torch.allclose(whole, sliced, atol=1e-4)


def test_a_callback_sees_every_step_and_may_change_the_latents(pipe: TuneAVideoPipeline) -> None:
    seen = []

    def callback(pipe, index, timestep, values):
        seen.append((index, int(timestep)))
        return {"latents": torch.zeros_like(values["latents"])}

    made = pipe("a square", callback_on_step_end=callback, **QUICK).frames
    assert seen == [(0, 501), (1, 1)] and not made.any()


def test_an_adapter_is_loaded_and_leaves_no_trace(base: Path, tmp_path: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(base)
    before = {name: value.clone() for name, value in stock.unet.state_dict().items()}
    folder = learned(image_unet()).save(tmp_path / "adapter", dtype=None)
    pipe = TuneAVideoPipeline.from_pretrained(base, adapter=folder)
    tuned = pipe("a square", generator=rng(), **QUICK).frames
    pipe.unload_video_adapter()
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    pipe.load_video_adapter(folder)
    assert torch.equal(tuned, pipe("a square", generator=rng(), **QUICK).frames)
    with pytest.raises(AdapterError, match=r"another base"):
        TuneAVideoPipeline.from_pretrained(base, adapter=learned(image_unet(seed=4)))


def test_an_adapter_comes_and_goes_whatever_was_done_before(pipe: TuneAVideoPipeline, tmp_path: Path) -> None:
    adapter = learned(image_unet())
    pipe("a square", **QUICK)
    pipe.load_video_adapter(adapter)
    tuned = pipe("a square", generator=rng(), **QUICK).frames
    pipe.unload_video_adapter()
    pipe("a square", **QUICK)
    donor = image_unet()
    donor.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(donor))
    pipe.load_lora_weights(tmp_path)
    pipe.load_video_adapter(adapter)
    pipe.unload_lora_weights()
    assert torch.allclose(tuned, pipe("a square", generator=rng(), **QUICK).frames, atol=1e-4)
    pipe.unload_video_adapter()


def test_it_is_made_of_the_components_of_a_stock_pipeline(base: Path) -> None:
    stock = models.open(str(base))
    assert type(stock) is StableDiffusionPipeline
    assert TuneAVideoPipeline(**stock.components)("a square", **QUICK).frames.shape == (1, 4, 3, 8, 8)


def test_inverted_noise_is_turned_back_into_the_clip(pipe: TuneAVideoPipeline, tmp_path: Path) -> None:
    torch.nn.init.normal_(pipe.unet.conv_out.weight, std=0.0005)  # as smooth as a trained model
    clip = read(moving_square(tmp_path / "square.mp4"), count=3, size=(16, 16))
    noise = pipe.invert(clip, num_inference_steps=50)
    back = pipe("", latents=noise, guidance_scale=1.0, num_inference_steps=50, output_type="np").frames[0]
    moments = models.encode(pipe, clip)
    decoded = models.decode(pipe, moments["mean"], 8)[0].frames_THWC / 255
    assert 10 * np.log10(1 / ((back - decoded) ** 2).mean()) > 30


def test_style_loras_load_before_and_after_inflation(pipe: TuneAVideoPipeline, tmp_path: Path) -> None:
    donor = image_unet()
    donor.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    lora = get_peft_model_state_dict(donor)
    kept = {name: value for name, value in lora.items() if "attn_temp" not in name}
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=kept)
    plain = pipe("a square", generator=rng(), **QUICK).frames
    pipe.load_lora_weights(tmp_path)
    styled = pipe("a square", generator=rng(), **QUICK).frames
    assert (plain - styled).abs().max() > 1e-3
    pipe.unload_lora_weights()
    assert torch.allclose(plain, pipe("a square", generator=rng(), **QUICK).frames, atol=1e-5)


def test_moments_do_not_depend_on_how_many_frames_are_encoded_at_once(pipe: TuneAVideoPipeline) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    together = models.encode(pipe, Video(frames, 8.0))
    alone = models.encode(pipe, Video(frames[1:2], 8.0))
    assert torch.allclose(together["mean"][:, :, 1:2], alone["mean"], atol=1e-6)
