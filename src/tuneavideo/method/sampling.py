"""Guided sampling from noise to a clip, as a generator of steps, with attention injection from a source clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet
from tuneavideo.method.noise import Sampler, ddim_move


@dataclass
class EditStep:
    """Latents `B C T H W` after step `number` of `total`; the last ones are the edit.

    The caller may change `latents`, `text`, `negative` and `guidance_scale`: the next step takes them from here. Set
    `stop` to make this the last step.
    """

    number: int
    total: int
    latents: Tensor
    text: Conditions
    negative: Conditions
    guidance_scale: float
    stop: bool = False


def mix_noise(
    inverted: Tensor, clean: Tensor, alpha: float, fraction: float, generator: torch.Generator | None
) -> Tensor:
    """Replace a fraction of the noise in `inverted` (at level `alpha`, found from `clean`) by fresh noise.

    The variance of the noise stays what it was; 0 changes nothing, 1 leaves only the noisy clip, as SDEdit starts.
    """
    if not fraction:
        return inverted
    level = torch.tensor(alpha, device=clean.device)
    noise = (inverted - level.sqrt() * clean) / (1 - level).sqrt()
    fresh = randn_tensor(clean.shape, generator=generator, device=torch.device(clean.device), dtype=clean.dtype)
    return ddim_move(clean, (1 - fraction**2) ** 0.5 * noise + fraction * fresh, level)


Injected = tuple[Tensor, Conditions]
"""Latents `1 C T H W` and caption of the source clip, whose queries and keys are injected."""


@dataclass(frozen=True)
class Source:
    """The source clip of attention injection.

    Attributes:
        latents: `1 C T H W` before each step of the sampler: the inversion, backwards.
        text: Conditions of its caption, or the bare embedding `1 L D`.
        fraction: Of the steps, the first ones, in which queries and keys of the source are injected into the edits
            (Plug-and-Play, Tumanyan et al. 2023).
    """

    latents: Sequence[Tensor]
    text: Conditions | Tensor
    fraction: float

    def injected(self, number: int, total: int) -> Injected | None:
        """Return latents and caption to inject at step `number` (counted from 0), or None."""
        return (self.latents[number], Conditions.of(self.text)) if number < self.fraction * total else None


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
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Iterator[EditStep]:
    """Denoise `start_BCTHW`, at the level where `sampler` starts, towards the text; yields after every step.

    Args:
        video: The (tuned) video UNet.
        sampler: Which scheduler, how many steps, from where.
        start_BCTHW: Inverted or random latents of B clips.
        text: What each clip should show.
        negative: What it should not show (the empty prompt, usually).
        guidance_scale: Classifier-free guidance (Ho & Salimans, eq. 6, with w = scale - 1); 1 or less is none.
        batch_guidance: Both predictions in one batch, or one after the other.
        guidance_interval: Fractions of the steps between which there is guidance (Kynkaanniemi et al. 2024).
        source: The source clip of attention injection.
        generator: For samplers that add noise; a list has one for each clip.
    """
    x, timesteps = sampler.enter(start_BCTHW), sampler.timesteps.to(start_BCTHW.device)
    step = EditStep(0, len(timesteps), x, Conditions.of(text), Conditions.of(negative), guidance_scale)
    for number, t in enumerate(timesteps):
        x, guided = step.latents, Guided(video, step.text, step.negative, batch_guidance)
        seen, at = sampler.scaled(x, t), number / len(timesteps)
        scale = step.guidance_scale if guidance_interval[0] <= at < guidance_interval[1] else 1.0
        injected = source.injected(number, len(timesteps)) if source else None
        x = sampler.step(guided(seen, t, scale, injected).to(x.dtype), t, x, generator)
        step = replace(step, number=number + 1, latents=x)
        yield step
        if step.stop:
            return


@dataclass(frozen=True)
class Guided:
    """Guided predictions of all edits, led by the clip they are made of or not."""

    video: VideoUNet
    text: Conditions
    negative: Conditions
    batched: bool

    def __call__(self, x: Tensor, t: Tensor, scale: float, injected: Injected | None) -> Tensor:
        if scale <= 1:
            return self._predict(x, t, self.text, injected)
        if self.batched:
            both = self._predict(torch.cat([x, x]), t, self.negative.joined(self.text), injected)
            without, towards = both.chunk(2)
        else:
            without, towards = (self._predict(x, t, text, injected) for text in (self.negative, self.text))
        return without + scale * (towards - without)

    def _predict(self, x: Tensor, t: Tensor, text: Conditions, injected: Injected | None) -> Tensor:
        if injected is None:
            return self.video(x, t, text)
        self.video.clip.inject = True
        try:
            return self.video(torch.cat([injected[0].to(x.device), x]), t, injected[1].joined(text))[1:]
        finally:
            self.video.clip.inject = False
