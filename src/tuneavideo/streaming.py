"""Clips too long for memory: encoded, inverted and edited window by window, with their latents on the disk.

The arithmetic is that of `inversion` and `editing`. A step changes latents in place: frames that no later window sees.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from tuneavideo import cache, editing, models
from tuneavideo.noise import Levels, Sampler, ddim_move, split
from tuneavideo.reels import Reel
from tuneavideo.video import Spool
from tuneavideo.windows import WindowedUNet


@dataclass(frozen=True)
class ReelStep:
    """Latents of a clip after step `number` of `total`; the same reel at every step."""

    number: int
    total: int
    latents: Reel


def encode(pipe: StableDiffusionPipeline, clip: Spool, path: Path) -> None:
    """Keep the moments of a clip's latents, as `models.encode` returns them, in the file `path`."""
    moments = models.encoded(pipe, clip)
    mean, std = next(moments)
    shape = (1, mean.shape[1], clip.frames, *mean.shape[2:])
    with cache.writing(path, {"mean": shape, "std": shape}) as kept:
        for number in range(clip.frames):
            kept["mean"][:, :, [number]], kept["std"][:, :, [number]] = mean[:, :, None], std[:, :, None]
            mean, std = next(moments, (mean, std))


def mix_noise(
    inverted: Reel, clean: Reel, alpha: float, share: float, generator: torch.Generator, *, folder: Path
) -> Reel:
    """See `editing.mix_noise`; fresh noise is drawn frame by frame."""
    if not share:
        return inverted
    mixed = _copy(inverted, folder)
    for place in _places(mixed):
        mixed[place] = editing.mix_noise(mixed[place], clean[place], alpha, share, generator)
    return mixed


@torch.no_grad()
def invert(
    video: WindowedUNet, levels: Levels, latents: Reel, text_BLD: Tensor, timesteps: list[int], *, folder: Path
) -> Iterator[ReelStep]:
    """See `inversion.invert`; the latents of all steps are one reel, in a file without a name in `folder`."""
    x, alpha = _copy(latents, folder), levels.final_alpha.to(latents.device)
    for number, t in enumerate(timesteps, start=1):
        predict = partial(video.video, t=torch.tensor(t, device=x.device), text_BLD=text_BLD)
        above = levels.alphas[t].to(x.device)
        for frames, output in video.windows.blended(predict, partial(_frames, x), x.shape[2], float(t)):
            part = x[:, :, frames]
            clean, noise = split(part, output.to(part.dtype), alpha, levels.prediction_type)
            x[:, :, frames] = ddim_move(clean, noise, above)
        alpha = above
        yield ReelStep(number, len(timesteps), x)


@torch.no_grad()
def generate(
    video: WindowedUNet,
    sampler: Sampler,
    start: Reel,
    text_BLD: Tensor,
    negative_BLD: Tensor,
    guidance_scale: float,
    *,
    batch_guidance: bool = True,
    generator: torch.Generator | None = None,
    folder: Path,
) -> Iterator[ReelStep]:
    """See `editing.generate`, of one clip; the latents of all steps are one reel, in a file without a name in `folder`.

    Every frame has a twin of the sampler. Of DDIM and Euler these remember nothing; samplers that look back keep their
    last predictions in memory. Noise that a sampler adds is drawn frame by frame.
    """
    x = _copy(start, folder)
    twins = [sampler.twin() for _ in range(x.shape[2])]
    for place in _places(x):
        x[place] = sampler.enter(x[place])

    def guided(seen: Tensor, t: Tensor) -> Tensor:
        return editing.guided(video.video, seen, t, text_BLD, negative_BLD, guidance_scale, batch_guidance)

    def scaled(frames: list[int], t: Tensor) -> Tensor:
        return torch.cat([twins[each].scaled(x[:, :, [each]], t) for each in frames], dim=2)

    for number, t in enumerate(sampler.timesteps.to(x.device), start=1):
        parts = video.windows.blended(partial(guided, t=t), partial(scaled, t=t), x.shape[2], float(t))
        for frames, output in parts:
            for each, one in zip(frames, output.split(1, dim=2), strict=True):
                before = x[:, :, [each]]
                x[:, :, [each]] = twins[each].step(one.to(before.dtype), t, before, generator)
        yield ReelStep(number, len(sampler.timesteps), x)


def _frames(x: Reel, frames: list[int]) -> Tensor:
    return x[:, :, frames]


def _places(x: Reel) -> list[tuple[slice, slice, list[int]]]:
    """Every frame by itself."""
    return [(slice(None), slice(None), [number]) for number in range(x.shape[2])]


def _copy(reel: Reel, folder: Path) -> Reel:
    file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it goes with the reel
    copy = Reel(file, reel.shape, device=reel.device)
    copy.fill(reel)
    return copy
