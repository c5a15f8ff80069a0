"""Diffusers pipelines for Python users: stock Stable Diffusion pipelines whose UNet sees clips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from tuneavideo import models
from tuneavideo.adapter import Adapter, Attached
from tuneavideo.conditions import Conditions
from tuneavideo.editing import generate
from tuneavideo.errors import ModelError
from tuneavideo.inflate import VideoUNet, deflate, inflate, video_unet
from tuneavideo.inversion import invert
from tuneavideo.noise import Levels, Sampler
from tuneavideo.opening import opened
from tuneavideo.video import Video


@dataclass
class TuneAVideoPipelineOutput(BaseOutput):
    """What a call returns.

    Attributes:
        frames: One entry per prompt: a list of PIL images, or arrays `B T H W C` in 0..1 (`np`), tensors
            `B T C H W` in 0..1 (`pt`), or latents `B C T H W` (`latent`).
    """

    frames: list[list[Image.Image]] | np.ndarray | Tensor


_Stock: Any = object  # for type checkers: whichever stock pipeline it is mixed into


class _SeesClips(_Stock):
    """What makes a stock pipeline one of clips."""

    _attached: Attached | None = None

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, base: str | Path, *, adapter: Adapter | str | Path | None = None, **kwargs: Any
    ) -> Self:
        """Open a base as diffusers does, with a run's adapter if one is given.

        Args:
            base: A name of `tuneavideo models`, a hub id, a folder or a single file.
            adapter: An `Adapter`, or the `adapter` folder of a run.
            **kwargs: What `DiffusionPipeline.from_pretrained` takes (`dtype`, `variant`, `scheduler`, ...).
        """
        pipe = opened(str(base), super(), **kwargs)
        if pipe.unet.config.addition_embed_type and not issubclass(cls, StableDiffusionXLPipeline):
            raise ModelError(f"{base} is a Stable Diffusion XL: open it with TuneAVideoXLPipeline")
        if adapter is not None:
            pipe.load_video_adapter(adapter)
        return pipe

    def load_video_adapter(self, adapter: Adapter | str | Path) -> None:
        """Attach what a run learned; detaches another first. Raises AdapterError when it is of another base."""
        self.unload_video_adapter()
        deflate(self.unet)
        self._attached = (adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)).attach(self.unet)

    def unload_video_adapter(self) -> None:
        """Give the image UNet back, bit for bit."""
        if self._attached:
            self._attached.detach()
            self._attached = None

    @torch.no_grad()
    def invert(self, video: Video, num_inference_steps: int = 50) -> Tensor:
        """Noise that a clip came from (DDIM inversion, empty prompt), to be given to a call as `latents`.

        The scheduler's own spacing decides where the steps lie: call with a scheduler that starts where this ends,
        such as the same one with the same number of steps.

        Args:
            video: The clip, its sides multiples of the VAE's stride times 8.
            num_inference_steps: Steps up to the last noise level.

        Returns:
            Latents `1 C T H W`.
        """
        levels = Levels.of(self.scheduler)
        latents = models.encode(self, video)["mean"].to(self._execution_device)
        timesteps = levels.inversion_grid(num_inference_steps, None)
        for step in invert(self._video(), levels, latents, models.embed(self, [""]), timesteps):
            latents = step.latents
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: str | list[str] | None = None,
        *,
        num_frames: int = 8,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 12.5,
        negative_prompt: str | list[str] | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> TuneAVideoPipelineOutput | tuple:
        """Make one clip per prompt.

        Args:
            prompt: What each clip should show.
            num_frames: Frames of a clip, when no `latents` say so.
            height: Pixels; by default what the base was trained at.
            width: Pixels; by default what the base was trained at.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance; 1 is none.
            negative_prompt: What the clips should not show.
            generator: Of the first noise and of samplers that add noise.
            latents: Noise to start from, `B C T H W` or `1 C T H W`, such as `invert` returns.
            prompt_embeds: Text embedding `B L D`, instead of `prompt`.
            negative_prompt_embeds: The same, instead of `negative_prompt`.
            pooled_prompt_embeds: Goes with `prompt_embeds` in Stable Diffusion XL, `B D`.
            negative_pooled_prompt_embeds: Goes with `negative_prompt_embeds`.
            output_type: `pil`, `np`, `pt` or `latent`.
            return_dict: A `TuneAVideoPipelineOutput`, or a tuple of its fields.
            callback_on_step_end: Called with the pipeline, the step's index, its timestep and `{"latents": ...}`;
                latents it returns take their place.
            callback_on_step_end_tensor_inputs: What the callback is given; there are only `latents`.
        """
        if set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise ValueError(f"callbacks are given latents only; asked for {list(callback_on_step_end_tensor_inputs)}")
        text = self._told(prompt, prompt_embeds, pooled_prompt_embeds)
        negative = self._told(negative_prompt or "", negative_prompt_embeds, negative_pooled_prompt_embeds)
        self.scheduler.set_timesteps(num_inference_steps)
        sampler = Sampler(self.scheduler, 0)
        latents = self._start(latents, len(text), (num_frames, height, width), generator)
        steps = generate(
            self._video(), sampler, latents, text, negative.expand(len(text)), guidance_scale, generator=generator
        )
        with self.progress_bar(total=len(sampler.timesteps)) as bar:
            for index, step in enumerate(steps):
                latents = step.latents
                if callback_on_step_end:
                    t = sampler.timesteps[index]
                    changed = callback_on_step_end(self, index, t, {"latents": latents}) or {}
                    latents.copy_(changed.get("latents", latents))
                bar.update()
        frames = self._pictured(latents, output_type)
        self.maybe_free_model_hooks()
        return TuneAVideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _told(self, prompt: str | list[str] | None, text: Tensor | None, pooled: Tensor | None) -> Conditions:
        if text is None:
            return models.embed(self, _listed(prompt))
        return Conditions(text, pooled, stride=models.stride(self))

    def _video(self) -> VideoUNet:
        try:
            return video_unet(self.unet)
        except ModelError:
            return inflate(self.unet)

    def _start(
        self, latents: Tensor | None, batch: int, size: tuple[int, int | None, int | None], generator: Any
    ) -> Tensor:
        """Given or random latents of the whole batch, in float32 on the pipeline's device."""
        device = self._execution_device
        if latents is not None:
            return latents.to(device, torch.float32).expand(batch, *latents.shape[1:]).clone()
        frames, height, width = size
        side, stride = models.default_size(self), models.stride(self)
        channels = self.unet.config.in_channels
        shape = (batch, channels, frames, (height or side) // stride, (width or side) // stride)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _pictured(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        clips = [video.frames_THWC for video in models.decode(self, latents, fps=8)]
        if output_type == "pil":
            return [[Image.fromarray(frame) for frame in clip] for clip in clips]
        pixels = np.stack(clips).astype(np.float32) / 255
        if output_type == "pt":
            return torch.from_numpy(pixels).permute(0, 1, 4, 2, 3)
        return pixels


class TuneAVideoPipeline(_SeesClips, StableDiffusionPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Text to video with a Stable Diffusion 1.x or 2.x base and a tuned adapter.

    Everything a `StableDiffusionPipeline` can do with its components (offload, VAE slicing and tiling,
    `load_lora_weights`, textual inversion, schedulers) works as there; its UNet is inflated in place. It serves one
    request at a time.
    """


class TuneAVideoXLPipeline(_SeesClips, StableDiffusionXLPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The same for a Stable Diffusion XL base."""


def _listed(prompt: str | list[str] | None) -> list[str]:
    if prompt is None:
        raise ValueError("give prompt or prompt_embeds")
    return [prompt] if isinstance(prompt, str) else prompt
