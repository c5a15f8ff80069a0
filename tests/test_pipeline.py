"""The pipeline: a Stable Diffusion pipeline that takes clips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from tests.conftest import image_unet, moving_square
from tests.shared.adapter import learned
from tuneavideo import TuneAVideoPipeline, api
from tuneavideo.bases import BASES
from tuneavideo.errors import AdapterError, SettingsError
from tuneavideo.models import codec, pipelines
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import Video, read, write

QUICK = {"num_frames": 3, "num_inference_steps": 2, "output_type": "latent"}

CLIP = Video(np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8), 8.0)


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
    text, empty = codec.embed(pipe, ["a square", ""]).text_BLD.split(1)
    sliced = pipe(prompt_embeds=text, negative_prompt_embeds=empty, generator=rng(), **QUICK).frames
    assert torch.allclose(whole, sliced, atol=1e-4)


def test_a_callback_sees_every_step_and_may_change_the_latents(pipe: TuneAVideoPipeline) -> None:
    seen = []

    def callback(pipe, index, timestep, values):
        seen.append((index, int(timestep)))
        return {"latents": torch.zeros_like(values["latents"])}

    made = pipe("a square", callback_on_step_end=callback, **QUICK).frames
    assert seen == [(0, 999), (1, 499)] and not made.any()


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
    stock = pipelines.load_pipeline(str(base))
    assert type(stock) is StableDiffusionPipeline
    assert TuneAVideoPipeline(**stock.components)("a square", **QUICK).frames.shape == (1, 4, 3, 8, 8)


# Edits of a clip


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned clip, with settings of its own."""
    folder = tmp_path_factory.mktemp("runs")
    own = {"max_train_steps": 3, "num_frames": 4, "mixed_precision": "no", "learning_rate": 1e-2, "seeds": (1,)}
    own |= {"num_inference_steps": 4, "guidance_scale": 3.0, "attention_injection": 0.5, "resolution": 32}
    return api.tune(
        moving_square(folder / "square.mp4"),
        "a red square moves",
        base=str(base),
        out=folder / "run",
        progress=False,
        **own,
    )


def half_mask(file: Path, side: int) -> Path:
    """Write a mask whose left part is bright."""
    Image.fromarray(np.repeat([[255] * 18 + [0] * (side - 18)], side, axis=0).astype(np.uint8)).save(file)
    return file


PROMPTS = ["a blue circle moves", "a red circle jumps"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strength": 0.5, "fresh_noise": 0.4, "negative_prompt": "red", "temporal_consistency": 0.7},
        {"guidance_interval": (0.0, 0.6), "attention_injection": 1.0, "feature_reuse": 2},
        {"window": 3, "batch_guidance": False},
        {"sampler": "dpm++"},
        {"sampler": "euler-ancestral", "attention_injection": 0.0, "num_inference_steps": 3, "temporal_consistency": 1},
        {"mask": "MASK", "fresh_noise": 0.4, "temporal_consistency": 0.7},
        {"keep": True, "fresh_noise": 0.4},
        {"mask": "MASK", "attention_injection": 0.0, "sampler": "euler", "strength": 0.5},
    ],
)
def test_it_makes_the_frames_that_the_command_makes(settings: dict, run: Path, tmp_path: Path) -> None:
    if "mask" in settings:
        settings = settings | {"mask": str(half_mask(tmp_path / "mask.png", 32))}
    folders = api.edit(run, PROMPTS, formats=("frames",), batch_prompts=2, progress=False, **settings)
    pipe = TuneAVideoPipeline.from_pretrained(RunFolder(run).read_settings().base, adapter=run / "adapter")
    pipe.set_progress_bar_config(disable=True)
    steps = {name: settings[name] for name in ("num_inference_steps", "window") if name in settings}
    generators = [torch.Generator().manual_seed(1) for _ in PROMPTS]
    made = pipe(PROMPTS, latents=pipe.invert(**steps), generator=generators, output_type="video", **settings).frames
    for folder, clip in zip(folders, made, strict=True):
        assert np.array_equal(clip.frames_THWC, read(folder / "frames").frames_THWC)
        assert clip.fps == 8.0


def test_a_clip_comes_back_as_it_can_be_written(pipe: TuneAVideoPipeline, clip: Path, tmp_path: Path) -> None:
    inverted = pipe.invert(read(clip, size=(16, 16)), 2, prompt="a red square")
    (made,) = pipe("a square", latents=inverted, num_inference_steps=2, output_type="video").frames
    write(made, tmp_path / "made.mp4")
    assert read(tmp_path / "made.mp4").frames == 6
    with pytest.raises(SettingsError, match="no clip to invert"):
        pipe.invert()


@pytest.mark.parametrize(
    ("made", "asked", "said"),
    [
        ({}, {"num_inference_steps": 3}, "every timestep"),
        ({}, {"attention_injection": 0.0, "timestep_spacing": "leading"}, "starts at"),
        ({}, {"num_inference_steps": 4, "sampler": "plms"}, "sampler plms"),
        ({}, {"num_inference_step": 4}, "did you mean 'num_inference_steps'"),
        (None, {"attention_injection": 0.6}, "needs an inverted clip"),
        (None, {"strength": 0.6}, "needs an inverted clip"),
    ],
)  # fmt: skip
def test_sampling_from_where_the_clip_is_not_known_is_refused(
    made: dict | None, asked: dict, said: str, pipe: TuneAVideoPipeline
) -> None:
    latents = None if made is None else pipe.invert(CLIP, 4)
    with pytest.raises(SettingsError, match=said):
        pipe("a square", latents=latents, **asked)


def test_inversion_and_sampling_meet_whatever_scheduler_the_base_ships(base: Path, tmp_path: Path) -> None:
    shipped = StableDiffusionPipeline.from_pretrained(base)
    shipped.scheduler = PNDMScheduler.from_config(shipped.scheduler.config, skip_prk_steps=True)
    shipped.save_pretrained(tmp_path)
    back = {}
    for folder in (base, tmp_path):
        pipe = TuneAVideoPipeline.from_pretrained(folder)
        back[folder] = pipe(
            "a square", latents=pipe.invert(CLIP, 6), num_inference_steps=6, output_type="latent"
        ).frames
    assert torch.equal(*back.values())
    own = {"num_inference_steps": 6, "output_type": "latent", "guidance_scale": 1.0}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    inverted = pipe.invert(CLIP, 6)
    led = pipe("a square", latents=inverted, **own).frames
    assert int(pipe.scheduler.timesteps[0]) == inverted.trajectory.timesteps[0] < 999
    assert torch.isfinite(led).all()
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    with pytest.raises(SettingsError, match="attention_injection needs"):
        pipe("a square", latents=pipe.invert(CLIP, 6), **own)
    assert torch.isfinite(pipe("a square", latents=pipe.invert(CLIP, 6), attention_injection=0.0, **own).frames).all()


def test_inverted_noise_is_turned_back_into_the_clip(pipe: TuneAVideoPipeline, tmp_path: Path) -> None:
    torch.nn.init.normal_(pipe.unet.conv_out.weight, std=0.0005)  # as smooth as a trained model
    clip = read(moving_square(tmp_path / "square.mp4"), count=3, size=(16, 16))
    noise = pipe.invert(clip, num_inference_steps=50)
    back = pipe("", latents=noise, guidance_scale=1.0, num_inference_steps=50, output_type="np").frames[0]
    moments = codec.encode(pipe, clip)
    decoded = codec.decode(pipe, moments["mean"], 8)[0].frames_THWC / 255
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
    together = codec.encode(pipe, Video(frames, 8.0))
    alone = codec.encode(pipe, Video(frames[1:2], 8.0))
    assert torch.allclose(together["mean"][:, :, 1:2], alone["mean"], atol=1e-6)


# What users of diffusers rely on


def test_callbacks_are_given_embeddings_and_may_change_them(pipe: TuneAVideoPipeline) -> None:
    names, seen = ["latents", "prompt_embeds", "negative_prompt_embeds"], []

    def swap(pipe, index, timestep, values):
        seen.append([tuple(values[name].shape) for name in names])
        values["prompt_embeds"] = values["prompt_embeds"].flip(0)
        return values

    told = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": names}
    swapped = pipe("a square", negative_prompt="red", generator=rng(), **told, **QUICK).frames
    assert seen == [[(1, 4, 3, 8, 8), (2, 12, 24), (1, 12, 24)]] * 2
    assert not torch.equal(swapped, pipe("a square", negative_prompt="red", generator=rng(), **QUICK).frames)
    with pytest.raises(ValueError, match="has to be in"):
        pipe("a square", callback_on_step_end=swap, callback_on_step_end_tensor_inputs=["text"], **QUICK)


def test_a_callback_may_end_guidance_or_the_sampling(pipe: TuneAVideoPipeline) -> None:
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    ended = pipe("a square", generator=rng(), callback_on_step_end=cutoff, **QUICK).frames
    assert pipe.guidance_scale == 0.0
    part = pipe("a square", generator=rng(), guidance_interval=(0.0, 0.4), **QUICK).frames
    assert torch.allclose(ended, part, atol=1e-3)
    seen = []

    def stop(pipe, index, timestep, values):
        seen.append(index)
        pipe._interrupt = True

    pipe("a square", callback_on_step_end=stop, **QUICK)
    assert seen == [0] and pipe.num_timesteps == 2
    pipe("a square", callback_on_step_end=stop, **QUICK)
    assert seen == [0, 0]


def test_pixels_are_rounded_where_they_become_pictures_only(pipe: TuneAVideoPipeline) -> None:
    np_, pt, pil, video = (
        pipe("a square", generator=rng(), **QUICK | {"output_type": kind}).frames
        for kind in ("np", "pt", "pil", "video")
    )
    assert np.array_equal(np_[0], pt[0].permute(0, 2, 3, 1).numpy())
    assert len(np.unique(np_)) > 256 and np_.dtype == np.float32
    assert np.array_equal((np_[0] * 255).round(), np.stack([np.asarray(frame) for frame in pil[0]]))
    assert np.array_equal((np_[0] * 255).round(), video[0].frames_THWC)
    with pytest.raises(ValueError, match="output_type"):
        pipe("a square", **QUICK | {"output_type": "jpg"})


def test_clips_of_a_batch_are_those_made_alone(pipe: TuneAVideoPipeline) -> None:
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3, 4)]
    together = pipe(["a square", "a circle"], num_videos_per_prompt=2, generator=seeds, **QUICK).frames
    for at, (prompt, seed) in enumerate(zip(["a square"] * 2 + ["a circle"] * 2, (1, 2, 3, 4), strict=True)):
        alone = pipe(prompt, generator=torch.Generator().manual_seed(seed), **QUICK).frames
        assert torch.allclose(together[[at]], alone, atol=1e-2)  # of latents around 30


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 12, 24)}, "either prompt or prompt_embeds"),
        ({}, "either prompt or prompt_embeds"),
        ({"prompt": ["a", "a", "a"], "negative_prompt": ["red", "blue"]}, "2 negative prompts for 3"),
        ({"prompt": "a", "generator": [rng(), rng()]}, "2 generators for 1"),
        ({"prompt": "a", "height": 17}, "multiples of 2"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments: dict, said: str, pipe: TuneAVideoPipeline) -> None:
    with pytest.raises(ValueError, match=said):
        pipe(**arguments, **QUICK)


def test_what_is_saved_is_opened_again_with_its_adapter(base: Path, tmp_path: Path) -> None:
    pipe = TuneAVideoPipeline.from_pretrained(base, adapter=learned(image_unet()))
    before = pipe("a square", generator=rng(), **QUICK).frames
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(before, pipe("a square", generator=rng(), **QUICK).frames)
    again = TuneAVideoPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(before, again("a square", generator=rng(), **QUICK).frames)
    again.unload_video_adapter()
    plain = TuneAVideoPipeline.from_pretrained(base)
    assert torch.equal(
        plain("a square", generator=rng(), **QUICK).frames, again("a square", generator=rng(), **QUICK).frames
    )
    with pytest.raises(ValueError, match="variant=fp16"):
        TuneAVideoPipeline.from_pretrained(base, variant="fp16")


@pytest.mark.parametrize("inflated", [False, True])
def test_weights_may_rest_in_eight_bits(inflated: bool, base: Path) -> None:
    pipe = TuneAVideoPipeline.from_pretrained(base, adapter=learned(image_unet()) if inflated else None)
    whole = pipe("a square", generator=rng(), **QUICK).frames if inflated else None
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    made = pipe("a square", generator=rng(), **QUICK).frames
    assert any(weight.dtype == torch.float8_e4m3fn for weight in pipe.unet.parameters())
    assert torch.isfinite(made).all()
    if whole is not None:
        assert 0 < (made - whole).abs().mean() < whole.abs().mean() / 2


def test_it_computes_in_the_precision_it_is_brought_to(pipe: TuneAVideoPipeline) -> None:
    whole = pipe("a square", generator=rng(), **QUICK).frames
    half = pipe.to(torch.bfloat16)("a square", generator=rng(), **QUICK).frames
    assert pipe.unet.dtype == torch.bfloat16 and 0 < (whole - half).abs().mean() < whole.abs().mean() / 10


def test_pixels_are_divided_before_they_are_rounded_to_half_precision(pipe: TuneAVideoPipeline) -> None:
    seen = []
    pipe.vae.to(torch.bfloat16)
    pipe.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    codec.encode(pipe, Video(ramp, 8.0))
    levels = (seen[0][0, 0].float().flatten() + 1) * 127.5
    assert (levels - torch.arange(256)).abs().max() < 0.3


def test_every_base_is_inverted_in_steps_that_lead_back() -> None:
    for base in BASES:
        assert api.tune_settings({"video": "a.mp4", "prompt": "a", "base": base}).inversion_steps >= 20


def test_a_clip_says_what_it_is_in_one_line() -> None:
    assert repr(CLIP) == "Video(3 frames of 16 x 16, 8 frames per second, no sound)"


def test_the_top_level_has_the_commands_whatever_was_imported(base: Path) -> None:
    import tuneavideo
    import tuneavideo.reporting

    for name in ("tune", "resume", "edit", "invert", "evaluate", "report", "convert", "adopt"):
        assert callable(getattr(tuneavideo, name)) and name in tuneavideo.__all__


@pytest.mark.parametrize("shown", [True, False])
def test_python_users_see_bars_and_nothing_of_other_libraries(shown: bool, run: Path, capfd) -> None:
    api.edit(run, "a blue circle", progress=shown, num_inference_steps=2)
    lines = capfd.readouterr().err
    assert ("edit: a blue circle" in lines) == shown
    assert "Loading" not in lines and (shown or not lines)
