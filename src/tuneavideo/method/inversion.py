"""DDIM inversion: latents of a clip at rising timesteps (Tune-A-Video, section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tuneavideo.errors import SettingsError
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet
from tuneavideo.method.noise import NoiseSchedule, Sampler, ddim_move, split

# Relative difference of equal alpha_bars; those of neighbouring timesteps among 50 differ by a fifth and more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class InversionStep:
    """Latents `B C T H W` after step `number` of `total`, of alpha_bar `alpha`."""

    number: int
    total: int
    latents: Tensor
    alpha: float


def starts_at(sampler: Sampler, noise_schedule: NoiseSchedule, t: int) -> bool:
    """Return whether `sampler` starts at the alpha_bar of timestep `t`."""
    return math.isclose(float(noise_schedule.alphas[t]), sampler.start_alpha, rel_tol=TOLERANCE, abs_tol=1e-6)


def path_to(sampler: Sampler, noise_schedule: NoiseSchedule, steps: int, spacing: str | None) -> list[int]:
    """Return the rising timesteps of the inversion that ends where `sampler` starts.

    Raises:
        SettingsError: No step of the inversion ends there; the message says which settings would.
    """
    grid = noise_schedule.inversion_grid(steps, spacing)
    for number, t in enumerate(grid, start=1):
        if starts_at(sampler, noise_schedule, t):
            return grid[:number]
    raise SettingsError(
        f"sampling starts at timestep {float(sampler.timesteps[0]):g}, where no step of the inversion ends: its "
        f"{steps} steps end at {grid[0]}, {grid[1] if steps > 1 else ''}, ..., {grid[-1]}. Set timestep_spacing to "
        "trailing, or num_inv_steps to num_inference_steps, or another strength"
    )


@torch.no_grad()
def invert(
    video: VideoUNet,
    noise_schedule: NoiseSchedule,
    latents_BCTHW: Tensor,
    text: Conditions | Tensor,
    timesteps: list[int],
) -> Iterator[InversionStep]:
    """Invert clean latents by DDIM (eq. 12 backwards), without guidance; yields after every step.

    Each step evaluates the UNet at the timestep it leads to, on the latents it starts from, as diffusers'
    `DDIMInverseScheduler` and the published code do. A velocity is converted to noise at the timestep of the
    prediction, so that models of both prediction types are inverted equally well.

    Args:
        video: The video UNet.
        noise_schedule: Noise schedule of the base model.
        latents_BCTHW: Clean latents.
        text: Conditions of the prompt, usually the empty one.
        timesteps: Rising.
    """
    x = latents_BCTHW
    device = x.device
    alpha = noise_schedule.final_alpha.to(device)
    for number, t in enumerate(timesteps, start=1):
        output = video(x, torch.tensor(t, device=device), text).to(x.dtype)
        above = noise_schedule.alphas[t].to(device)
        x, alpha = move(x, output, alpha, above, noise_schedule.prediction_type), above
        yield InversionStep(number, len(timesteps), x, float(alpha))


def move(x: Tensor, output: Tensor, alpha: Tensor, above: Tensor, prediction_type: str) -> Tensor:
    """Move latents from alpha_bar `alpha` to `above`, that of the prediction."""
    _, noise = split(x, output, above, prediction_type)
    clean, _ = split(x, noise, alpha, "epsilon")
    return ddim_move(clean, noise, above)
