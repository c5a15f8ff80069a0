"""An edit from end to end: from a clip's latents to noise, and from there, with new prompts, to new latents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuneavideo.errors import SettingsError
from tuneavideo.method import inversion, sampling
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.deepcache import reusing
from tuneavideo.method.inflate import VideoUNet
from tuneavideo.method.noise import NoiseSchedule, Sampler
from tuneavideo.method.sampling import EditStep, Source
from tuneavideo.method.windows import WindowedUNet, Windows
from tuneavideo.settings import Sampling


@dataclass(frozen=True)
class Trajectory:
    """A clip at the timesteps of an inversion, noisiest first.

    Attributes:
        latents: `S C T H W`: the clip at each of `timesteps`; in a whole trajectory, then clean.
        timesteps: Falling.
    """

    latents: Tensor
    timesteps: tuple[int, ...]

    def start(self, sampler: Sampler, noise_schedule: NoiseSchedule, injected: float = 0.0) -> int:
        """The place in `timesteps` at which sampling starts, with injection in a fraction of its steps.

        Raises:
            SettingsError: Sampling passes levels at which the clip is not known.
        """
        needed = [round(float(t)) for t in sampler.timesteps]
        known = f"the inversion has the clip at timesteps {_listed(self.timesteps)}"
        first = next(
            (place for place, t in enumerate(self.timesteps) if inversion.starts_at(sampler, noise_schedule, t)), None
        )
        if first is None:
            raise SettingsError(
                f"sampling starts at timestep {float(sampler.timesteps[0]):g}; {known}. Invert and sample with the "
                "same num_inference_steps and timestep_spacing, or take another strength"
            )
        count = math.ceil(injected * len(needed))
        if tuple(needed[:count]) != self.timesteps[first : first + count]:
            raise SettingsError(
                f"attention_injection needs the clip at every level of the sampling, which passes {_listed(needed)}; "
                f"{known}. Invert and sample with the same num_inference_steps and timestep_spacing, take sampler "
                "ddim, or set attention_injection to 0"
            )
        return first


def prepared(video: VideoUNet, settings: Sampling, frames: int, *, reuse: int = 1) -> Any:
    """The UNet for a clip of so many frames: in windows if one does not hold it, or with inner features reused.

    Raises:
        SettingsError: Windows go neither with `reuse` nor with a ControlNet.
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
    """The sampler that `settings` ask for, at its first step."""
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
        timesteps: Rising; `inversion.path_to` finds those that end where sampling starts.
        whole: Keep the latents at all timesteps, which attention injection needs, or at the last one only.
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
) -> Iterator[EditStep]:
    """Denoise an inverted clip towards B prompts; yields after every step.

    Args:
        video: The UNet, as `prepared` returns it or any other with the call of a `VideoUNet`.
        noise_schedule: Noise schedule of the base model.
        sampler: Such as `sampler_of` returns.
        settings: Guidance, attention injection and fresh noise.
        trajectory: Of the clip, as `invert` returns it.
        clean: Latents of the clip, `1 C T H W`.
        caption: Conditions of what the clip shows, for attention injection.
        text: What each edit should show.
        negative: What the edits should not show: of each, or of all.
        generator: Of fresh noise and of samplers that add noise; a list has one for each edit.

    Raises:
        SettingsError: The trajectory does not have the levels that the sampler passes.
    """
    fraction, count = settings.attention_injection, len(text)
    latents = trajectory.latents.split(1)[trajectory.start(sampler, noise_schedule, fraction) :]
    generators: list[Any] = generator if isinstance(generator, list) else [generator] * count
    options: dict[str, Any] = {
        "batch_guidance": settings.batch_guidance,
        "guidance_interval": settings.guidance_interval,
        "source": Source(latents, caption, fraction) if fraction else None,
    }
    inverted, fresh, alpha = latents[0].to(clean.device), settings.fresh_noise, sampler.start_alpha
    start = torch.cat([sampling.mix_noise(inverted, clean, alpha, fresh, each) for each in generators])
    negative = negative if len(negative) == count else negative.expand(count)
    options |= {"generator": generators[0] if count == 1 else generator}
    yield from sampling.generate(video, sampler, start, text, negative, settings.guidance_scale, **options)


def _listed(timesteps: Sequence[int]) -> str:
    return ", ".join(map(str, timesteps)) if len(timesteps) < 5 else (
        f"{timesteps[0]}, {timesteps[1]}, {timesteps[2]}, ..., {timesteps[-1]}"
    )  # fmt: skip
