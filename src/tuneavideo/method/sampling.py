"""Guided sampling with attention injection from a source clip, as a generator of steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.consistency import Consistency
from tuneavideo.method.inflate import VideoUNet
from tuneavideo.method.noise import NoiseSchedule, Sampler, ddim_move, split


@dataclass
class EditStep:
    """Latents `B C T H W` after step `number` of `total`; the last ones are the edit.

    The caller may change `latents`, `text`, `negative` and `guidance_scale` for the next step, or set `stop` to make
    this step the last one. `prediction` is the model's input, its output and the timestep.
    """

    number: int
    total: int
    latents: Tensor
    text: Conditions
    negative: Conditions
    guidance_scale: float
    stop: bool = False
    prediction: tuple[Tensor, Tensor, Tensor] | None = None

    def clean(self, noise_schedule: NoiseSchedule) -> Tensor:
        """Return the clean latents `B C T H W` that the model predicted in this step."""
        assert self.prediction, "the first step was made"
        x, output, t = self.prediction
        return split(x, output, noise_schedule.alphas[round(float(t))].to(x), noise_schedule.prediction_type)[0]


def mix_noise(
    inverted: Tensor, clean: Tensor, alpha: float, fraction: float | Tensor, generator: torch.Generator | None
) -> Tensor:
    """Replace a fraction of the noise in inverted latents by fresh noise of the same variance.

    Args:
        inverted: Latents `1 C T H W` at `alpha`.
        clean: Latents of the clip.
        alpha: alpha_bar in 0..1.
        fraction: In 0..1, of all latents or of each; 0 changes nothing, 1 gives the start of SDEdit.
        generator: Source of fresh noise.
    """
    if isinstance(fraction, float) and not fraction:
        return inverted
    alpha_bar = torch.tensor(alpha, device=clean.device)
    noise = (inverted - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()
    fresh = randn_tensor(clean.shape, generator=generator, device=torch.device(clean.device), dtype=clean.dtype)
    return ddim_move(clean, (1 - fraction**2) ** 0.5 * noise + fraction * fresh, alpha_bar)


Injected = tuple[Tensor, Conditions]
"""Latents `1 C T H W` and caption of the source clip, whose queries and keys are injected."""


@dataclass(frozen=True)
class Source:
    """The source clip of attention injection.

    Attributes:
        latents: `1 C T H W` before each step of the sampler: the inverted latents, noisiest first.
        text: Conditions of its caption, or the text embedding `1 L D` alone.
        fraction: Fraction of the steps, from the first, in which queries and keys of the source are injected into the
            edits (Plug-and-Play, Tumanyan et al. 2023).
    """

    latents: Sequence[Tensor]
    text: Conditions | Tensor
    fraction: float

    def injected(self, number: int, total: int) -> Injected | None:
        """Return latents and caption to inject at step `number` (counted from 0), or None."""
        return (self.latents[number], Conditions.of(self.text)) if number < self.fraction * total else None


@dataclass(frozen=True)
class Background:
    """The source clip outside a mask (blended latents, Avrahami et al. 2023).

    Attributes:
        mask: `B 1 T H W` in 0..1, 1 where edits may change; B and T may be 1.
        latents: `1 C T H W` of the source before each step of the sampler, and after the last.
        alphas: Their alpha_bars.
    """

    mask: Tensor
    latents: Sequence[Tensor]
    alphas: Sequence[float]

    def restore(self, x: Tensor, sampler: Sampler, number: int) -> Tensor:
        """Replace the background of latents `B C T H W` after step `number` of `sampler` by the source's."""
        return sampler.scale(self.latents[number].to(x), self.alphas[number]).lerp(x, self.mask.to(x))


@torch.no_grad()
def generate(
    video: VideoUNet,
    sampler: Sampler,
    start_BCTHW: Tensor,
    text: Conditions | Tensor,
    negative: Conditions | Tensor,
    guidance_scale: float,
    *,
    batch_guidance: bool = True,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    source: Source | None = None,
    consistency: tuple[Consistency, NoiseSchedule] | None = None,
    background: Background | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Iterator[EditStep]:
    """Denoise latents towards a text; yields after every step.

    Args:
        video: The (tuned) video UNet.
        sampler: A sampler at its first step.
        start_BCTHW: Inverted or random latents of B clips, at the sampler's `start_alpha`.
        text: Conditions of each clip's prompt.
        negative: Conditions of the negative prompts, usually the empty prompt.
        guidance_scale: Scale of classifier-free guidance (Ho & Salimans, eq. 6, with w = scale - 1); at 1 or less there
            is none.
        batch_guidance: Whether both predictions of guidance are computed in one batch.
        guidance_interval: Fractions of the steps between which there is guidance (Kynkaanniemi et al. 2024).
        source: Source clip of attention injection.
        consistency: Correspondences of the source clip, and the base's noise schedule.
        background: The source clip, where it must not change.
        generator: For samplers that add noise; a list has one per clip.
    """
    x, timesteps = sampler.scale(start_BCTHW, sampler.start_alpha), sampler.timesteps.to(start_BCTHW.device)
    step = EditStep(0, len(timesteps), x, Conditions.of(text), Conditions.of(negative), guidance_scale)
    for number, t in enumerate(timesteps):
        x, guided = step.latents, Guided(video, step.text, step.negative, batch_guidance)
        scaled, at = sampler.scale_input(x, t), number / len(timesteps)
        scale = step.guidance_scale if guidance_interval[0] <= at < guidance_interval[1] else 1.0
        injected = source.injected(number, len(timesteps)) if source else None
        output = guided(scaled, t, scale, injected).to(x.dtype)
        if consistency:
            output = consistency[0].corrected(output, scaled, t, consistency[1])
        x = sampler.step(output, t, x, generator)
        if background:
            x = background.restore(x, sampler, number + 1)
        step = replace(step, number=number + 1, latents=x, prediction=(scaled, output, t))
        yield step
        if step.stop:
            return


@dataclass(frozen=True)
class Guided:
    """Predictions of all edits with classifier-free guidance, with or without attention injection."""

    video: VideoUNet
    text: Conditions
    negative: Conditions
    batched: bool

    def __call__(self, x: Tensor, t: Tensor, scale: float, injected: Injected | None) -> Tensor:
        if scale <= 1:
            return self._predict(x, t, self.text, injected)
        if self.batched:
            both = self._predict(torch.cat([x, x]), t, self.negative.joined(self.text), injected)
            negative, positive = both.chunk(2)
        else:
            negative, positive = (self._predict(x, t, text, injected) for text in (self.negative, self.text))
        return negative + scale * (positive - negative)

    def _predict(self, x: Tensor, t: Tensor, text: Conditions, injected: Injected | None) -> Tensor:
        if injected is None:
            return self.video(x, t, text)
        self.video.clip.inject = True
        try:
            return self.video(torch.cat([injected[0].to(x.device), x]), t, injected[1].joined(text))[1:]
        finally:
            self.video.clip.inject = False
