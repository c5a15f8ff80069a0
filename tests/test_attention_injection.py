"""Attention injection, and guidance in part of the steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from einops import rearrange
from torch.nn.functional import scaled_dot_product_attention

from tests.conftest import image_unet
from tests.shared.job import BRIEF
from tests.shared.noise import STABLE
from tuneavideo import api
from tuneavideo.errors import SettingsError
from tuneavideo.method.attention import SparseCausalAttention, TemporalAttention, referred
from tuneavideo.method.inflate import VideoUNet, inflate
from tuneavideo.method.inversion import invert, path_to
from tuneavideo.method.noise import NoiseSchedule
from tuneavideo.method.sampling import Source, generate
from tuneavideo.samplers import OWN_TIMESTEPS, SAMPLERS
from tuneavideo.settings import Inflation

LEVELS = NoiseSchedule.of(DDIMScheduler(**STABLE))
CLIP, TEXT = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, 24)


@pytest.fixture(scope="module")
def video() -> VideoUNet:
    return inflate(image_unet(2), Inflation(temporal_init="official"))


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    return rearrange(x, "n l (h d) -> n h l d", h=heads)


@torch.no_grad()
@pytest.mark.parametrize("kind", [SparseCausalAttention, TemporalAttention])
def test_with_injection_every_clip_has_the_map_of_the_first_and_values_of_its_own(kind: type, video: VideoUNet) -> None:
    layer = next(layer for layer in video.unet.modules() if isinstance(layer, kind))
    frames, width = 3, layer.to_q.in_features
    x = torch.randn(2 * 6, 4, width)  # two clips, of two sets of three frames or of six sites
    layer.clip.clips, layer.clip.frames, layer.clip.inject = 2, frames, True
    references = ("first", "previous")

    def seen(y: torch.Tensor) -> torch.Tensor:
        if kind is TemporalAttention:
            return y
        return referred(rearrange(y, "(b t) l c -> b t l c", t=frames), 0, frames, references).flatten(0, 1)

    try:
        made = layer(x)
    finally:
        layer.clip.inject = False
    source = x[:6]
    q, k = layer.to_q(source).repeat(2, 1, 1), seen(layer.to_k(source)).repeat(2, 1, 1)
    mixed = scaled_dot_product_attention(
        *(split(y, layer.heads) for y in (q, k, seen(layer.to_v(x)))), scale=layer.scale
    )
    assert torch.allclose(made, layer.to_out[0](rearrange(mixed, "n h l d -> n l (h d)")), atol=1e-5)


def test_injecting_a_clip_into_itself_changes_nothing(video: VideoUNet) -> None:
    sampler = LEVELS.sampler("ddim", 3, spacing="trailing")
    trajectory = [
        CLIP,
        *(s.latents for s in invert(video, LEVELS, CLIP, TEXT, path_to(sampler, LEVELS, 3, "trailing"))),
    ][::-1]
    injected, plain = (
        next(generate(video, sampler_again(), trajectory[0], TEXT, TEXT, 1.0, source=source)).latents
        for source in (Source(trajectory, TEXT, 1.0), None)
    )
    assert torch.allclose(injected, plain, atol=1e-4)
    assert not video.clip.inject


def sampler_again():
    return LEVELS.sampler("ddim", 3, spacing="trailing")


def test_injection_is_in_the_first_steps_only(video: VideoUNet) -> None:
    seen = []

    class Watched:
        clip = video.clip

        def __call__(self, x, *rest):
            seen.append((len(x), video.clip.inject))
            return video(x, *rest)

    trajectory, other = [CLIP] * 4, torch.randn_like(CLIP)
    for _ in generate(Watched(), sampler_again(), other, TEXT, TEXT, 2.0, source=Source(trajectory, TEXT, 0.6)):  # pyright: ignore
        pass
    assert seen == [(3, True), (3, True), (2, False)]


def test_guidance_in_part_of_the_steps_saves_half_of_the_others(video: VideoUNet) -> None:
    whole, part, none = (
        [step.latents for step in generate(video, sampler_again(), CLIP, TEXT, TEXT * 0, scale, guidance_interval=span)]
        for scale, span in ((3.0, (0.0, 1.0)), (3.0, (0.0, 0.4)), (1.0, (0.0, 1.0)))
    )
    assert torch.allclose(whole[1], part[1]) and not torch.allclose(whole[2], part[2])
    assert not torch.allclose(part[2], none[2])


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in OWN_TIMESTEPS])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_samplers_step_on_the_levels_of_the_inversion(name: str, strength: float) -> None:
    sampler = LEVELS.sampler(name, 10, spacing="trailing", strength=strength)
    path = path_to(sampler, LEVELS, 10, "trailing")
    assert [round(float(t)) for t in sampler.timesteps] == path[::-1]


@pytest.mark.parametrize(
    ("stated", "line"),
    [
        ({"num_inv_steps": 7}, "set num_inv_steps (now 7) to num_inference_steps (50)"),
        ({"sampler": "dpm++", "timestep_spacing": "leading"}, "needs timestep_spacing trailing (now leading)"),
        ({"sampler": "heun"}, "sampler heun"),
    ],
)
def test_what_does_not_go_with_following_is_said(stated: dict, line: str) -> None:
    with pytest.raises(SettingsError, match=line.replace("(", r"\(").replace(")", r"\)")):
        api.tune_settings({"video": "a.mp4", "prompt": "a square"} | stated | {"num_inference_steps": 50})


def test_a_job_follows_by_default_and_keeps_the_trajectory_in_the_run_folder(
    base: Path, clip: Path, tmp_path: Path
) -> None:
    run = api.tune(clip, "a red square moves", base=str(base), out=tmp_path / "run", **BRIEF)
    (first,) = api.edit(run, "a blue circle moves")
    (again,) = api.edit(run, "a blue circle moves")
    (alone,) = api.edit(run, "a blue circle moves", attention_injection=0.0)
    made = [(folder / "edit.mp4").read_bytes() for folder in (first, again, alone)]
    assert made[0] == made[1] != made[2]
    assert len(list((run / "inversion").iterdir())) == 2
