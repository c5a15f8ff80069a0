"""Video pipelines of diffusers: inversion of clips, edits, and clips from random noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from tuneavideo.errors import ModelError, SettingsError
from tuneavideo.method import consistency, editing, sampling
from tuneavideo.method.changes import edit_masks
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.editing import Trajectory
from tuneavideo.method.inflate import VideoUNet, inflate, video_unet
from tuneavideo.method.noise import NoiseSchedule, Sampler
from tuneavideo.method.sampling import EditStep
from tuneavideo.models import codec
from tuneavideo.pipeline.adapters import AdapterMixin
from tuneavideo.pipeline.callbacks import TENSORS, Callback, StepCallback
from tuneavideo.settings import Sampling
from tuneavideo.storage import cache
from tuneavideo.video import Video, read
from tuneavideo.video.flow import neighbour_flows
from tuneavideo.video.masks import Mask

OUTPUT_TYPES = ("pil", "video", "np", "pt", "latent")
# Settings that need an inverted clip, with the values at which they have no effect.
_OF_CLIPS = {
    "attention_injection": 0.0, "temporal_consistency": 0.0, "keep": False, "fresh_noise": 0.0, "strength": 1.0,
}  # fmt: skip
FPS = 8.0
"""Frame rate of clips from random noise, in frames per second."""


@dataclass
class TuneAVideoPipelineOutput(BaseOutput):
    """The clips of a call.

    Attributes:
        frames: One entry per clip: a list of PIL images (`pil`) or a `Video` (`video`); or one array `B T H W C` in
            0..1 (`np`), one tensor `B T C H W` in 0..1 (`pt`), or latents `B C T H W` (`latent`).
    """

    frames: list[list[Image.Image]] | list[Video] | np.ndarray | Tensor


@dataclass(frozen=True)
class InvertedClip:
    """A clip's latents at every timestep of an inversion, from which edits start.

    Attributes:
        trajectory: Latents from noise to the clean clip.
        caption: Conditions of the clip's caption, for attention injection.
        fps: Frame rate of the clip, in frames per second.
        sound_SC: Its sound; see `Video`.
        video: The clip itself, for temporal consistency.
    """

    trajectory: Trajectory
    caption: Conditions
    fps: float = FPS
    sound_SC: np.ndarray | None = None
    video: Video | None = None

    @cached_property
    def flows(self) -> list[np.ndarray]:
        """Motion of the clip: flow from every frame to its neighbours, see `Consistency`."""
        if self.video is None:
            raise SettingsError("temporal_consistency needs the frames of the clip: give the result of invert")
        height, width = self.clean.shape[3:]
        return neighbour_flows(self.video.images, height, width, consistency.RADIUS)

    @property
    def noise(self) -> Tensor:
        """Latents `1 C T H W` at the last timestep of the inversion."""
        return self.trajectory.latents[:1]

    @property
    def clean(self) -> Tensor:
        """Latents `1 C T H W` of the clip itself."""
        return self.trajectory.latents[-1:]


class VideoMixin(AdapterMixin):
    """The methods that both video pipelines add to their stock pipelines."""

    _callback_tensor_inputs = TENSORS

    @torch.no_grad()
    def invert(
        self,
        video: Video | None = None,
        num_inference_steps: int | None = None,
        *,
        prompt: str | None = None,
        **settings: Any,
    ) -> InvertedClip:
        """Invert a clip (DDIM inversion, empty prompt), for a call with the result as `latents`.

        Args:
            video: The clip, uint8 `T H W C`; its sides are multiples of 8 times the VAE's stride (64 pixels with Stable
                Diffusion). None: the clip that the adapter was tuned on, if the adapter is in a run folder.
            num_inference_steps: Number of inversion steps, which is that of the call as well. None: that of the run or
                base.
            prompt: Caption of the clip, for attention injection. None: that of the adapter.
            **settings: `timestep_spacing`, `window` and `window_overlap`, as in a call.

        Returns:
            Latents `1 C T H W` at every timestep of the inversion, with the caption, frame rate and sound of the clip.

        Raises:
            SettingsError: There is no clip, or a setting is unknown or wrong.
        """
        chosen = self._settings(_given(settings, num_inference_steps=num_inference_steps))
        noise_schedule, steps = NoiseSchedule.of(self.scheduler), chosen.inversion_steps
        if video is None:
            video, clean = self._tuned_clip()
        else:
            clean = codec.encode(self, video)["mean"]
        if prompt is None:
            prompt = str(self._adapter.about.get("prompt", "")) if self._adapter else ""
        empty, caption = codec.embed(self, [""]), codec.embed(self, [prompt])
        unet, clean = editing.prepared(self._video(), chosen, clean.shape[2]), clean.to(self._execution_device)
        with self.progress_bar(total=steps) as bar:
            grid = noise_schedule.inversion_grid(steps, chosen.timestep_spacing)
            last = None
            for last in editing.invert(unet, noise_schedule, clean, empty, grid):  # noqa: B007 - the last one is wanted
                bar.update()
        assert last, "an inversion has steps"
        self.maybe_free_model_hooks()
        return InvertedClip(last.trajectory, caption, video.fps, video.sound_SC, video)

    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        prompt: str | list[str] | None = None,
        *,
        num_frames: int = 8,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: InvertedClip | Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        mask: np.ndarray | str | Path | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> TuneAVideoPipelineOutput | tuple:
        """Edit an inverted clip, as `tuneavideo edit` does, or generate clips from random noise.

        Args:
            prompt: Prompt of each clip.
            num_frames: Number of frames of a clip from random noise.
            height: Its height in pixels. None: that of the base's training.
            width: Its width in pixels. None: that of the base's training.
            num_inference_steps: Number of denoising steps. None, here and below: the value of the run or base.
            guidance_scale: Classifier-free guidance scale; 1 and less disable guidance.
            negative_prompt: Text that the clips are guided away from; one for all, or one per prompt.
            num_videos_per_prompt: Number of clips per prompt.
            generator: Source of all noise, one for all clips or a list with one per clip. The seed n of the command
                line is `torch.Generator().manual_seed(n)`.
            latents: Result of `invert`, or noise `B C T H W` or `1 C T H W`. None: random noise.
            prompt_embeds: Text embeddings `B L D`, instead of `prompt`.
            negative_prompt_embeds: Text embeddings `B L D` or `1 L D`, instead of `negative_prompt`.
            pooled_prompt_embeds: Pooled text embeddings `B D` of an XL base, with `prompt_embeds`.
            negative_pooled_prompt_embeds: The same, with `negative_prompt_embeds`.
            mask: Where an inverted clip may change: a file as in `tuneavideo edit`, or booleans `H W` or `T H W` at its
                size. Elsewhere frames are the clip's. None: everywhere.
            output_type: `pil`, `video`, `np`, `pt` or `latent`; see `TuneAVideoPipelineOutput`.
            return_dict: Return a `TuneAVideoPipelineOutput`, otherwise a tuple of its fields.
            callback_on_step_end: Function of pipeline, step index, timestep and the tensors named below; tensors that
                it returns replace those. With guidance, `prompt_embeds` has the negative embeddings first.
            callback_on_step_end_tensor_inputs: `latents`, `prompt_embeds` or `negative_prompt_embeds`.
            **settings: Other fields of `Sampling`; a `sampler` precedes the pipeline's own scheduler.

        Raises:
            SettingsError: A setting is unknown or wrong, or `latents` end at another timestep than sampling starts at.
            ValueError: Arguments contradict each other.
        """
        callback = StepCallback.of(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type has to be in {OUTPUT_TYPES}, found {output_type!r}")
        given = _given(settings, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        chosen = self._settings(given if isinstance(latents, InvertedClip) else _without_clip(given))
        embeds = (prompt_embeds, pooled_prompt_embeds), (negative_prompt_embeds, negative_pooled_prompt_embeds)
        negative_prompt = chosen.negative_prompt if negative_prompt is None else negative_prompt
        conditions = self._conditions(prompt, negative_prompt, *embeds, copies=num_videos_per_prompt)
        sampler, size = self._sampler(given, chosen), (num_frames, height, width)
        source = latents if isinstance(latents, InvertedClip) else None
        masks = self._masks(mask, source, chosen, conditions[0])
        steps = self._steps(latents, size, chosen, sampler, *conditions, generator, masks)
        result = self._denoised(steps, sampler, chosen, callback)
        frames = self._decoded(result, output_type, chosen, source, masks)
        return TuneAVideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _steps(
        self,
        latents: InvertedClip | Tensor | None,
        size: tuple[int, int | None, int | None],
        chosen: Sampling,
        sampler: Sampler,
        text: Conditions,
        negative: Conditions,
        generator: Any,
        masks: list[Mask | None],
    ) -> Iterator[EditStep]:
        """Return the denoising steps of an inverted clip, or of given or random noise of a size (frames, pixels)."""
        if isinstance(generator, list) and len(generator) != len(text):
            raise ValueError(f"{len(generator)} generators for {len(text)} clips; give one for each, or one for all")
        if not isinstance(latents, InvertedClip):
            start = self._start(latents, len(text), size, generator)
            unet = editing.prepared(self._video(), chosen, start.shape[2], reuse=chosen.feature_reuse)
            return sampling.generate(
                unet, sampler, start, text, negative, chosen.guidance_scale, batch_guidance=chosen.batch_guidance,
                guidance_interval=chosen.guidance_interval, generator=generator,
            )  # fmt: skip
        device = self._execution_device
        trajectory = replace(latents.trajectory, latents=latents.trajectory.latents.to(device))
        unet = editing.prepared(self._video(), chosen, trajectory.latents.shape[2], reuse=chosen.feature_reuse)
        return editing.edit(
            unet, NoiseSchedule.of(self.scheduler), sampler, chosen, trajectory, trajectory.latents[-1:],
            latents.caption.to(device), text, negative, generator,
            flows=latents.flows if chosen.temporal_consistency else (),
            mask=codec.latent_masks(masks, trajectory.latents),
        )  # fmt: skip

    def _masks(
        self, mask: np.ndarray | str | Path | None, source: InvertedClip | None, chosen: Sampling, text: Conditions
    ) -> list[Mask | None]:
        """Return the mask of each clip of a call."""
        given = self._mask(mask, source)
        if not chosen.keep:
            return [given] * len(text)
        if source is None or source.video is None:
            raise SettingsError("keep needs the frames of the clip: give what invert returns as latents")
        unet = editing.prepared(self._video(), chosen, source.clean.shape[2])
        caption, empty = source.caption.to(self._execution_device), codec.embed(self, [""])
        return edit_masks(source.video, given, unet, source.trajectory, caption, text, empty)

    def _mask(self, mask: np.ndarray | str | Path | None, source: InvertedClip | None) -> Mask | None:
        """Return the mask of a call. Raises SettingsError without a clip, ValueError for another shape."""
        if mask is None:
            return None
        if source is None or source.video is None:
            raise SettingsError("mask needs an inverted clip: give what invert returns as latents")
        if not isinstance(mask, np.ndarray):
            return Mask.read(Path(mask), source.video, self._run.read_settings().fit if self._run else "crop")
        inside_THW, shape = np.atleast_3d(mask.T).T.astype(bool), source.video.frames_THWC.shape[:3]
        if inside_THW.shape not in (shape, (1, *shape[1:])):
            raise ValueError(f"mask: expected {shape[1:]} or {shape}, as the clip has, found {mask.shape}")
        return Mask(source.video, inside_THW)

    def _denoised(
        self, steps: Iterator[EditStep], sampler: Sampler, chosen: Sampling, callback: StepCallback
    ) -> Tensor:
        """Take all steps, with a progress bar, and return the last latents `B C T H W`."""
        self._guidance_scale, self._interrupt = chosen.guidance_scale, False
        self._num_timesteps = len(sampler.timesteps)
        latents = None
        with self.progress_bar(total=self._num_timesteps) as bar:
            for index, step in enumerate(steps):
                callback(self, index, sampler.timesteps[index], step)
                latents = step.latents
                bar.update()
        assert latents is not None, "a sampling has steps"
        return latents

    def _tuned_clip(self) -> tuple[Video, Tensor]:
        """Return the clip of the adapter's run folder, and the latents that it was tuned on."""
        if self._run is None:
            raise SettingsError("no clip to invert: give one to invert, or load the adapter from a run folder")
        clip, kept = read(self._run.source), cache.read(self._run.latents)
        return clip, (kept or codec.encode(self, clip))["mean"]

    def _conditions(
        self,
        prompt: str | list[str] | None,
        negative: str | list[str],
        texts: tuple[Tensor | None, Tensor | None],
        negatives: tuple[Tensor | None, Tensor | None],
        *,
        copies: int,
    ) -> tuple[Conditions, Conditions]:
        """Return the positive and negative conditions of every clip, from prompts or (pooled) embeddings."""
        if (prompt is None) == (texts[0] is None):
            raise ValueError("give either prompt or prompt_embeds")
        given = [_listed(negative) if negatives[0] is None else [], [] if prompt is None else _listed(prompt)]
        embedded = codec.embed(self, [*given[0], *given[1]]).split([*map(len, given)]) if any(given) else [None, None]
        stride = codec.stride(self)
        without, text = (
            Conditions(embeds, pooled, stride=stride) if embeds is not None else own
            for (embeds, pooled), own in zip((negatives, texts), embedded, strict=True)
        )
        assert text and without
        if len(without) not in (1, len(text)):
            raise ValueError(
                f"{len(without)} negative prompts for {len(text)} prompts; give one for each, or one for all"
            )
        text = text.repeated(copies)
        return text, without.expand(len(text)) if len(without) == 1 else without.repeated(copies)

    def _video(self) -> VideoUNet:
        try:
            return video_unet(self.unet)
        except ModelError:
            return inflate(self.unet)

    def _start(
        self, latents: Tensor | None, batch: int, size: tuple[int, int | None, int | None], generator: Any
    ) -> Tensor:
        """Return given or random latents `B C T H W` of the whole batch, in float32 on the pipeline's device."""
        device = self._execution_device
        if latents is not None:
            return latents.to(device, torch.float32).expand(batch, *latents.shape[1:]).clone()
        stride, frames = codec.stride(self), size[0]
        height, width = (side or codec.default_size(self) for side in size[1:])
        if height % stride or width % stride:
            raise ValueError(f"height and width have to be multiples of {stride}, found {height} and {width}")
        shape = (batch, self.unet.config.in_channels, frames, height // stride, width // stride)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _decoded(
        self,
        latents: Tensor,
        output_type: str,
        chosen: Sampling,
        source: InvertedClip | None,
        masks: list[Mask | None],
    ) -> Any:
        """Return the frames of clips in the form of `TuneAVideoPipelineOutput`, with the sound of their source."""
        is_latent = output_type == "latent"
        clips_TCHW = [
            torch.stack([*codec.decode_pixels(self, *each)])
            for each in zip(latents.split(1), masks, strict=True)
            if not is_latent
        ]
        self.maybe_free_model_hooks()
        if is_latent:
            return latents
        if output_type == "pt":
            return torch.stack(clips_TCHW)
        clips = [clip.permute(0, 2, 3, 1).numpy() for clip in clips_TCHW]
        if output_type == "np":
            return np.stack(clips)
        clips = [(clip * 255).round().astype(np.uint8) for clip in clips]
        if output_type == "video":
            fps = chosen.fps or (source.fps if source else FPS)
            sound_SC = source.sound_SC if source and math.isclose(fps, source.fps, rel_tol=1e-4) else None
            return [Video(clip, fps, sound_SC) for clip in clips]
        return [[Image.fromarray(frame) for frame in clip] for clip in clips]


class TuneAVideoPipeline(VideoMixin, StableDiffusionPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Edits of clips, and clips from text, with a Stable Diffusion 1.x or 2.x base and a tuned adapter.

    Everything a `StableDiffusionPipeline` can do with its components (offload, VAE slicing and tiling,
    `load_lora_weights`, textual inversion, schedulers) works as there; its UNet is inflated in place. It serves one
    request at a time.
    """


class TuneAVideoXLPipeline(VideoMixin, StableDiffusionXLPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Edits of clips, and clips from text, with a Stable Diffusion XL base; see `TuneAVideoPipeline`."""


def _listed(prompt: str | list[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else prompt


def _given(settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {name: value for name, value in {**settings, **more}.items() if value is not None}


def _without_clip(given: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a sampling without an inverted clip. Raises SettingsError for those that need one."""
    for name, idle in _OF_CLIPS.items():
        if given.get(name, idle) != idle:
            raise SettingsError(f"{name} {given[name]} needs an inverted clip: give what invert returns as latents")
    return given | _OF_CLIPS
