"""Clips too long for memory: encoded, inverted and edited window by window, with their latents on the disk.

The arithmetic is that of `inversion` and `sampling`. A step changes latents in place: frames that no later window sees.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuneavideo.method import sampling
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.disk_latents import DiskLatents
from tuneavideo.method.inflate import VideoUNet
from tuneavideo.method.inversion import moved
from tuneavideo.method.noise import NoiseSchedule, Sampler
from tuneavideo.method.sampling import Guided, Source
from tuneavideo.method.windows import WindowedUNet
from tuneavideo.models import codec, host_memory
from tuneavideo.models.loading import Pipeline
from tuneavideo.storage import cache
from tuneavideo.video import DiskVideo


@dataclass(frozen=True)
class DiskStep:
    """Latents of a clip after step `number` of `total`; the same latents on disk at every step."""

    number: int
    total: int
    latents: DiskLatents


def encode(pipe: Pipeline, clip: DiskVideo, path: Path) -> None:
    """Keep the moments of a clip's latents, as `models.encode` returns them, in the file `path`."""
    moments = codec.encode_frames(pipe, clip)
    mean, std = next(moments)
    shape = (1, mean.shape[1], clip.frames, *mean.shape[2:])
    with cache.writing(path, {"mean": shape, "std": shape}) as kept:
        for number in range(clip.frames):
            kept["mean"][:, :, [number]], kept["std"][:, :, [number]] = mean[:, :, None], std[:, :, None]
            mean, std = next(moments, (mean, std))


def mix_noise(
    inverted: DiskLatents,
    clean: DiskLatents,
    alpha: float,
    share: float,
    generator: torch.Generator | None,
    *,
    folder: Path,
) -> DiskLatents:
    """See `sampling.mix_noise`; fresh noise is drawn frame by frame."""
    if not share:
        return inverted
    mixed = _copy(inverted, folder)
    for place in _places(mixed):
        mixed[place] = sampling.mix_noise(mixed[place], clean[place], alpha, share, generator)
    return mixed


@torch.no_grad()
def invert(
    video: WindowedUNet,
    noise_schedule: NoiseSchedule,
    latents: DiskLatents,
    text: Conditions | Tensor,
    timesteps: list[int],
    *,
    whole: bool,
    folder: Path,
) -> Iterator[DiskStep]:
    """See `inversion.invert`; the latents of all steps are in one temporary file in `folder`.

    The file holds the last step's latents, or with `whole` those of all steps, the last first, and the clean ones.
    """
    x, alpha = _copy(latents, folder), noise_schedule.final_alpha.to(latents.device)
    trajectory = _blank((len(timesteps) + 1 if whole else 1, *latents.shape[1:]), latents.device, folder)
    steps_latents = trajectory.split(1)
    steps_latents[-1].fill(latents)
    for number, t in enumerate(timesteps, start=1):
        above, now = noise_schedule.alphas[t].to(x.device), torch.tensor(t, device=x.device)
        predict = partial(_predicted, video.video, t=now, text=text)
        for frames, output in video.windows.blended(predict, partial(_frames, x), x.shape[2], float(t)):
            part = x[:, :, frames]
            x[:, :, frames] = moved(part, output.to(part.dtype), alpha, above, noise_schedule.prediction_type)
        alpha = above
        steps_latents[-1 - number if whole else 0].fill(x)
        yield DiskStep(number, len(timesteps), trajectory)


@torch.no_grad()
def generate(
    video: WindowedUNet,
    sampler: Sampler,
    start: DiskLatents,
    text: Conditions,
    negative: Conditions,
    guidance_scale: float,
    *,
    batch_guidance: bool = True,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    source: Source | None = None,
    generator: torch.Generator | None = None,
    folder: Path,
) -> Iterator[DiskStep]:
    """See `sampling.generate`, of one clip; latents of all steps are in one temporary file in `folder`.

    Every frame has a clone of the sampler. Those of DDIM and Euler hold no state; multistep samplers keep their
    last predictions in memory. Noise that a sampler adds is drawn frame by frame.
    """
    x, timesteps = _copy(start, folder), sampler.timesteps.to(start.device)
    samplers = [sampler.clone() for _ in range(x.shape[2])]
    for place in _places(x):
        x[place] = sampler.enter(x[place])
    guided = Guided(video.video, Conditions.of(text), Conditions.of(negative), batch_guidance)

    def read(frames: list[int], t: Tensor, injected: Any) -> Tensor:
        seen = torch.cat([samplers[each].scaled(x[:, :, [each]], t) for each in frames], dim=2)
        return torch.cat([injected[0][:, :, frames], seen]) if injected else seen

    def predict(part: Tensor, t: Tensor, scale: float, injected: Any) -> Tensor:
        return _alone(guided(part[-1:], t, scale, (part[:1], injected[1]) if injected else None))

    for number, t in enumerate(timesteps):
        inside = guidance_interval[0] <= number / len(timesteps) < guidance_interval[1]
        injected = source.injected(number, len(timesteps)) if source else None
        parts = video.windows.blended(
            partial(predict, t=t, scale=guidance_scale if inside else 1.0, injected=injected),
            partial(read, t=t, injected=injected),
            x.shape[2],
            float(t),
        )
        for frames, output in parts:
            for each, one in zip(frames, output.split(1, dim=2), strict=True):
                before = x[:, :, [each]]
                x[:, :, [each]] = samplers[each].step(one.to(before.dtype), t, before, generator)
        yield DiskStep(number + 1, len(timesteps), x)


def _predicted(video: VideoUNet, part: Tensor, t: Tensor, text: Conditions | Tensor) -> Tensor:
    return _alone(video(part, t, text))


def _alone(output: Tensor) -> Tensor:
    """Return a window's prediction, after free memory of a CPU has gone back: the gaps of many windows would add up."""
    if output.device.type == "cpu":
        host_memory.release_memory()
    return output


def _frames(x: DiskLatents, frames: list[int]) -> Tensor:
    return x[:, :, frames]


def _places(x: DiskLatents) -> list[tuple[slice, slice, list[int]]]:
    """Every frame by itself."""
    return [(slice(None), slice(None), [number]) for number in range(x.shape[2])]


def _copy(latents: DiskLatents, folder: Path) -> DiskLatents:
    copy = _blank(latents.shape, latents.device, folder)
    copy.fill(latents)
    return copy


def _blank(shape: tuple[int, ...], device: Any, folder: Path) -> DiskLatents:
    file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - it is deleted with its latents
    return DiskLatents(file, shape, device=device)
