"""Noise schedules, samplers, inversion and editing."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from tests.conftest import image_unet
from tests.shared.noise import STABLE
from tuneavideo.errors import SettingsError
from tuneavideo.method.inflate import VideoUNet, inflate
from tuneavideo.method.inversion import invert, path_to
from tuneavideo.method.noise import NoiseSchedule, add_noise, ddim_move, split, target
from tuneavideo.method.sampling import generate, mix_noise
from tuneavideo.samplers import SAMPLERS


def levels(**changes) -> NoiseSchedule:
    return NoiseSchedule.of(DDIMScheduler(**(STABLE | changes)))


@pytest.fixture(scope="module")
def video() -> VideoUNet:
    """Its prediction changes slowly from step to step, as that of a trained model does."""
    unet = image_unet(3)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.005)
    return inflate(unet)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_right_prediction_gives_back_the_clean_latents_and_the_noise(kind: str) -> None:
    clean, noise, alpha = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 3, 8, 8), torch.tensor([0.3, 0.9])
    noisy, answer = add_noise(clean, noise, alpha), target(clean, noise, alpha, kind)
    for b in range(2):
        found = split(noisy[b], answer[b], alpha[b], kind)
        assert torch.allclose(found[0], clean[b], atol=1e-5) and torch.allclose(found[1], noise[b], atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_those_of_diffusers(kind: str) -> None:
    scheduler = DDIMScheduler(**STABLE, prediction_type=kind)
    clean, noise, t = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 3, 8, 8), torch.tensor([7, 800])
    alpha = NoiseSchedule.of(scheduler).alphas[t]
    assert torch.allclose(add_noise(clean, noise, alpha), scheduler.add_noise(clean, noise, t), atol=1e-6)
    if kind == "v_prediction":
        velocity = scheduler.get_velocity(clean, noise, t)
        assert torch.allclose(target(clean, noise, alpha, kind), velocity, atol=1e-6)


def test_inversion_steps_as_the_inverse_scheduler_of_diffusers(video: VideoUNet) -> None:
    scheduler = DDIMInverseScheduler(**STABLE)
    scheduler.set_timesteps(10)
    own = levels()
    x = theirs = torch.randn(1, 4, 3, 8, 8)
    text = torch.randn(1, 5, 24)
    grid = own.inversion_grid(10, None)
    assert grid == scheduler.timesteps.tolist()
    for step in invert(video, own, x, text, grid):
        t = scheduler.timesteps[step.number - 1]
        with torch.no_grad():
            theirs = scheduler.step(video(theirs, t, text), t, theirs).prev_sample
        assert torch.allclose(step.latents, theirs, atol=1e-5)


def test_a_model_asked_for_the_velocity_is_inverted_like_the_same_model_asked_for_the_noise() -> None:
    noise, velocity, video = levels(), levels(prediction_type="v_prediction"), inflate(image_unet(3))

    def asked(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        output, alpha = video(x, t, text), noise.alphas[t]
        return target(split(x, output, alpha, "epsilon")[0], output, alpha, "v_prediction")

    x, text, grid = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, 24), noise.inversion_grid(10, "trailing")
    *_, told = invert(video, noise, x, text, grid)
    *_, implied = invert(asked, velocity, x, text, grid)
    assert torch.allclose(told.latents, implied.latents, atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_generation_without_guidance_undoes_inversion(
    kind: str, spacing: str, strength: float, video: VideoUNet
) -> None:
    own = levels(prediction_type=kind)
    sampler = own.sampler("ddim", 50, spacing=spacing, strength=strength)
    clean, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 5, 24)
    *_, up = invert(video, own, clean, text, path_to(sampler, own, 50, spacing))
    *_, down = generate(video, sampler, up.latents, text, text, 1.0)
    assert up.total == down.total == round(50 * strength)
    assert (down.latents - clean).norm() / clean.norm() < 0.05


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [50, 20])
def test_every_sampler_starts_where_a_trailing_inversion_ends(name: str, steps: int) -> None:
    own = levels()
    sampler = own.sampler(name, steps, spacing="trailing")
    assert path_to(sampler, own, 50, "trailing")[-1] == 999


class Knowing:
    """A stand-in for a perfect model: it knows the clean latents."""

    def __init__(self, clean: Tensor, own: NoiseSchedule) -> None:
        self.clean, self.own = clean, own

    def __call__(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        alpha = self.own.alphas[int(t)]
        return (x - alpha.sqrt() * self.clean) / (1 - alpha).sqrt()


@pytest.mark.parametrize(
    ("name", "strength"),
    [(name, strength) for name in SAMPLERS for strength in (1.0, 0.5)
     if name != "euler-ancestral" and (name, strength) != ("dpm++-karras", 0.5)],
)  # fmt: skip
def test_every_sampler_finds_what_a_perfect_model_knows(name: str, strength: float) -> None:
    own = levels()
    clean, text = torch.randn(1, 4, 2, 4, 4), torch.zeros(1, 1, 1)
    model = Knowing(clean, own)
    sampler = own.sampler(name, 20, spacing="trailing", strength=strength)
    *_, up = invert(model, own, clean, text, path_to(sampler, own, 20, "trailing"))  # pyright: ignore
    *_, down = generate(model, sampler, up.latents, text, text, 1.0)  # pyright: ignore
    assert (down.latents - clean).abs().max() < 0.15


def test_sampling_from_another_level_than_inversion_ended_on_is_refused_with_advice() -> None:
    own = levels()
    with pytest.raises(SettingsError, match=r"timestep 951.*end at 1, 21, \.\.\., 981.*timestep_spacing to trailing"):
        path_to(own.sampler("ddim", 20, spacing="leading"), own, 50, "leading")
    with pytest.raises(SettingsError, match="another strength"):  # its levels midway are its own
        path_to(own.sampler("dpm++-karras", 50, spacing="trailing", strength=0.5), own, 50, "trailing")


def test_more_steps_than_the_model_knows_are_refused() -> None:
    with pytest.raises(SettingsError, match="1000 timesteps"):
        levels().sampler("ddim", 1001)


def test_levels_are_those_of_the_scheduler_however_it_was_made() -> None:
    for scheduler in (DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear"), DDIMScheduler(500, beta_end=0.01)):
        assert torch.equal(NoiseSchedule.of(scheduler).alphas, scheduler.alphas_cumprod)


def test_samplers_are_what_their_names_say_whatever_the_base_ships() -> None:
    shipped = EulerDiscreteScheduler(beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True)
    own = NoiseSchedule.of(shipped)
    assert own.sampler("ddim", 5).scheduler.config.clip_sample is False
    assert own.sampler("dpm++", 5).scheduler.config.use_karras_sigmas is False
    assert own.sampler("dpm++-karras", 5).scheduler.config.use_karras_sigmas is True


def test_a_schedule_that_ends_in_pure_noise_can_be_inverted() -> None:
    own = levels(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert path_to(own.sampler("ddim", 20, spacing="trailing"), own, 50, "trailing")[-1] == 999


def test_models_that_predict_something_else_are_refused() -> None:
    with pytest.raises(SettingsError, match="'sample'"):
        levels(prediction_type="sample")


@torch.no_grad()
def test_guidance_in_one_batch_or_one_after_the_other_is_the_same(video: VideoUNet) -> None:
    own, x, texts = levels(), torch.randn(1, 4, 3, 8, 8), torch.randn(2, 1, 5, 24)
    results = []
    for batched in (True, False):
        sampler = own.sampler("ddim", 3)
        *_, last = generate(video, sampler, x, texts[0], texts[1], 7.5, batch_guidance=batched)
        results.append(last.latents)
    assert torch.allclose(*results, atol=1e-4)


def test_fresh_noise_keeps_the_level_and_the_seed() -> None:
    clean, noise, alpha = torch.randn(1, 4, 8, 32, 32), torch.randn(1, 4, 8, 32, 32), torch.tensor(0.4)
    inverted = ddim_move(clean, noise, alpha)
    rng = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    assert mix_noise(inverted, clean, 0.4, 0.0, rng()) is inverted
    mixed = mix_noise(inverted, clean, 0.4, 0.6, rng())
    assert torch.equal(mixed, mix_noise(inverted, clean, 0.4, 0.6, rng()))
    left = (mixed - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    assert abs(float(left.std()) - 1) < 0.02
    assert abs(float((left * noise).mean()) - 0.8) < 0.02
