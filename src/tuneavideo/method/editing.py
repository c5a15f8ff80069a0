"""Inversion of a clip's latents, and sampling of edits from the inverted latents with new prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuneavideo.errors import SettingsError
from tuneavideo.method import inversion, sampling
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.consistency import Consistency
from tuneavideo.method.deepcache import reusing
from tuneavideo.method.inflate import VideoUNet
from tuneavideo.method.noise import NoiseSchedule, Sampler
from tuneavideo.method.sampling import Background, EditStep, Source
from tuneavideo.method.windows import WindowedUNet, Windows
from tuneavideo.settings import Sampling


@dataclass(frozen=True)
class Trajectory:
    """Inverted latents of a clip, noisiest first.

    Attributes:
        latents: `S C T H W`: the latents at each of `timesteps`, and in a whole trajectory the clean ones last.
        timesteps: Falling.
    """

    latents: Tensor
    timesteps: tuple[int, ...]

    def start(
        self, sampler: Sampler, noise_schedule: NoiseSchedule, fraction: float = 0.0, name: str = "attention_injection"
    ) -> int:
        """Return the index in `timesteps` where sampling starts.

        Args:
            sampler: The sampler.
            noise_schedule: Noise schedule of the base model.
            fraction: Fraction of its steps, from the first, whose timesteps are needed.
            name: Setting that needs them.

        Raises:
            SettingsError: Sampling needs latents at a timestep that is not in the trajectory.
        """
        needed = [round(float(t)) for t in sampler.timesteps]
        known = f"the inversion has timesteps {_listed(self.timesteps)}"
        first = next(
            (place for place, t in enumerate(self.timesteps) if inversion.starts_at(sampler, noise_schedule, t)), None
        )
        if first is None:
            raise SettingsError(
                f"sampling starts at timestep {float(sampler.timesteps[0]):g}; {known}. Invert and sample with the "
                "same num_inference_steps and timestep_spacing, or take another strength"
            )
        count = math.ceil(fraction * len(needed))
        if tuple(needed[:count]) != self.timesteps[first : first + count]:
            raise SettingsError(
                f"{name} needs inverted latents at every timestep of the sampling, {_listed(needed)}; {known}. Invert "
                "and sample with the same num_inference_steps and timestep_spacing, take sampler ddim, or "
                + ("leave mask out" if name == "mask" else "set attention_injection to 0")
            )
        return first


def prepared(video: VideoUNet, settings: Sampling, frames: int, *, reuse: int = 1) -> Any:
    """Return the UNet for a clip of so many frames: in windows if one does not hold them, else with feature reuse.

    Args:
        video: The video UNet.
        settings: Size and overlap of windows.
        frames: Frames of the clip.
        reuse: Interval of feature reuse in steps; 1 for none.

    Raises:
        SettingsError: Windows exclude `reuse` and a ControlNet.
    """
    windows = Windows.of(settings, frames)
    if windows.holds(frames):
        return reusing(video, reuse)
    for name, is_set in (("feature_reuse", reuse > 1), ("controlnet", video.control)):
        if is_set:
            raise SettingsError(
                f"{name} does not go with a clip that is edited in windows ({frames} frames, windows of "
                f"{windows.size}); leave it out, or take fewer frames"
            )
    return WindowedUNet(video, windows)


def sampler_of(noise_schedule: NoiseSchedule, settings: Sampling) -> Sampler:
    """Return the sampler of the settings, at its first step."""
    return noise_schedule.sampler(
        settings.sampler,
        settings.num_inference_steps,
        spacing=settings.timestep_spacing,
        strength=settings.strength,
    )


@dataclass(frozen=True)
class InvertedStep:
    """An inversion after step `number` of `total`, with the trajectory so far."""

    number: int
    total: int
    trajectory: Trajectory


def invert(
    video: Any,
    noise_schedule: NoiseSchedule,
    clean: Tensor,
    empty: Conditions | Tensor,
    timesteps: Sequence[int],
    *,
    whole: bool = True,
    out: Tensor | None = None,
) -> Iterator[InvertedStep]:
    """Invert a clip; yields after every step.

    Args:
        video: The UNet, as `prepared` returns it or any other with the call of a `VideoUNet`.
        noise_schedule: Noise schedule of the base model.
        clean: Latents of the clip, `1 C T H W`.
        empty: Conditions of the empty prompt.
        timesteps: Rising; `inversion.path_to` returns those that end where sampling starts.
        whole: Whether to keep the latents at all timesteps, which attention injection needs, or at the last one only.
        out: Tensor for the latents of the trajectory, such as one mapped to a file; `S C T H W`, where S is
            `len(timesteps) + 1` if `whole`, else 1. By default it is made on the device of `clean`.
    """
    if out is None:
        out = clean.new_empty(len(timesteps) + 1 if whole else 1, *clean.shape[1:])
    out[-1] = clean[0]
    for step in inversion.invert(video, noise_schedule, clean, empty, [*timesteps]):
        first, passed = (-1 - step.number, 0) if whole else (-1, step.number - 1)
        out[first] = step.latents[0]
        yield InvertedStep(
            step.number, step.total, Trajectory(out[first:], tuple(timesteps[passed : step.number][::-1]))
        )


def edit(
    video: Any,
    noise_schedule: NoiseSchedule,
    sampler: Sampler,
    settings: Sampling,
    trajectory: Trajectory,
    clean: Tensor,
    caption: Conditions | Tensor,
    text: Conditions,
    negative: Conditions,
    generator: torch.Generator | list[torch.Generator] | None = None,
    *,
    flows: Sequence[np.ndarray] = (),
    mask: Tensor | None = None,
) -> Iterator[EditStep]:
    """Denoise an inverted clip towards B prompts; yields after every step.

    Args:
        video: The UNet, as `prepared` returns it or any other with the call of a `VideoUNet`.
        noise_schedule: Noise schedule of the base model.
        sampler: A sampler at its first step (see `sampler_of`).
        settings: Guidance, attention injection, temporal consistency and fresh noise.
        trajectory: Inverted latents of the clip (see `invert`).
        clean: Latents of the clip, `1 C T H W`.
        caption: Conditions of the clip's caption, for attention injection.
        text: Conditions of the B prompts.
        negative: Conditions of the negative prompt of each edit, or of one for all.
        generator: For fresh noise and samplers that add noise; a list has one per edit.
        flows: Motion of the clip, for temporal consistency (see `Consistency`).
        mask: `B 1 T H W` in 0..1 (B and T may be 1), 1 where the edits may change; elsewhere the latents are the clip's
            at every step, without fresh noise. It needs a whole trajectory.

    Raises:
        SettingsError: The trajectory lacks timesteps of the sampler.
    """
    fraction, count = settings.attention_injection, len(text)
    needed, name = (fraction, "attention_injection") if mask is None else (1.0, "mask")
    latents = trajectory.latents.split(1)[trajectory.start(sampler, noise_schedule, needed, name) :]
    generators: list[Any] = generator if isinstance(generator, list) else [generator] * count
    options: dict[str, Any] = {
        "batch_guidance": settings.batch_guidance,
        "guidance_interval": settings.guidance_interval,
        "source": Source(latents, caption, fraction) if fraction else None,
    }
    if settings.temporal_consistency:
        motion = [torch.from_numpy(flow).to(clean.device) for flow in flows]
        options["consistency"] = Consistency(clean, motion, settings.temporal_consistency), noise_schedule
    fresh: list[float | Tensor] = [settings.fresh_noise] * count
    if mask is not None:
        alphas = [*(float(noise_schedule.alphas[round(float(t))]) for t in sampler.timesteps), 1.0]
        options["background"] = Background(mask, latents, alphas)
        fresh = [*(settings.fresh_noise * mask).expand(count, *mask.shape[1:]).split(1)]
    inverted, alpha = latents[0].to(clean.device), sampler.start_alpha
    start = torch.cat(
        [sampling.mix_noise(inverted, clean, alpha, *each) for each in zip(fresh, generators, strict=True)]
    )
    negative = negative if len(negative) == count else negative.expand(count)
    options |= {"generator": generators[0] if count == 1 else generator}
    yield from sampling.generate(video, sampler, start, text, negative, settings.guidance_scale, **options)


def _listed(timesteps: Sequence[int]) -> str:
    return ", ".join(map(str, timesteps)) if len(timesteps) < 5 else (
        f"{timesteps[0]}, {timesteps[1]}, {timesteps[2]}, ..., {timesteps[-1]}"
    )  # fmt: skip
