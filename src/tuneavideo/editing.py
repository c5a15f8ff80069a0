"""From noise and a new prompt to a new clip: guided sampling, as a generator of steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tuneavideo.inflate import VideoUNet
from tuneavideo.noise import Sampler, ddim_move


@dataclass(frozen=True)
class EditStep:
    """Latents `B C T H W` after step `number` of `total`; the last ones are the edit."""

    number: int
    total: int
    latents: Tensor


def mix_noise(inverted: Tensor, clean: Tensor, alpha: float, share: float, generator: torch.Generator) -> Tensor:
    """Replace a share of the noise in `inverted` (at level `alpha`, found from `clean`) by fresh noise.

    The variance of the noise stays what it was; 0 changes nothing, 1 leaves only the noisy clip, as SDEdit starts.
    """
    if not share:
        return inverted
    level = torch.tensor(alpha, device=clean.device)
    noise = (inverted - level.sqrt() * clean) / (1 - level).sqrt()
    fresh = torch.randn(clean.shape, generator=generator).to(clean)
    return ddim_move(clean, (1 - share**2) ** 0.5 * noise + share * fresh, level)


@torch.no_grad()
def generate(
    video: VideoUNet,
    sampler: Sampler,
    start_BCTHW: Tensor,
    text_BLD: Tensor,
    negative_BLD: Tensor,
    guidance_scale: float,
    *,
    batch_guidance: bool = True,
    generator: torch.Generator | None = None,
) -> Iterator[EditStep]:
    """Denoise `start_BCTHW`, at the level where `sampler` starts, towards the text; yields after every step.

    Args:
        video: The (tuned) video UNet.
        sampler: Which scheduler, how many steps, from where.
        start_BCTHW: Inverted or random latents of B clips.
        text_BLD: What each clip should show.
        negative_BLD: What it should not show (the empty prompt, usually).
        guidance_scale: Classifier-free guidance (Ho & Salimans, eq. 6, with w = scale - 1); 1 is none.
        batch_guidance: Both predictions in one batch, or one after the other.
        generator: For samplers that add noise.
    """
    x = sampler.enter(start_BCTHW)
    timesteps = sampler.timesteps.to(x.device)
    for number, t in enumerate(timesteps, start=1):
        seen = sampler.scaled(x, t)
        output = guided(video, seen, t, text_BLD, negative_BLD, guidance_scale, batch_guidance).to(x.dtype)
        x = sampler.step(output, t, x, generator)
        yield EditStep(number, len(timesteps), x)


def guided(
    video: VideoUNet, x: Tensor, t: Tensor, text: Tensor, negative: Tensor, scale: float, batched: bool
) -> Tensor:
    """The prediction for latents `x`, scaled as the UNet wants them, guided from `negative` to `text`."""
    if scale == 1:
        return video(x, t, text)
    if batched:
        without, towards = video(torch.cat([x, x]), t, torch.cat([negative, text])).chunk(2)
    else:
        without, towards = video(x, t, negative), video(x, t, text)
    return without + scale * (towards - without)
