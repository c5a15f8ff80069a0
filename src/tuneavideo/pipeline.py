"""Diffusers pipelines for Python users: stock Stable Diffusion pipelines whose UNet sees clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from tuneavideo.bases import BASES
from tuneavideo.config import checked
from tuneavideo.errors import ModelError, SettingsError
from tuneavideo.method import editing, sampling
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.editing import Trajectory
from tuneavideo.method.inflate import VideoUNet, deflate, inflate, video_unet
from tuneavideo.method.noise import NoiseSchedule, Sampler
from tuneavideo.method.sampling import EditStep
from tuneavideo.models import codec, loading
from tuneavideo.models.adapter import Adapter, Attached
from tuneavideo.models.loading import load_stock_pipeline
from tuneavideo.settings import Sampling
from tuneavideo.storage import cache
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import Video, read

OUTPUT_TYPES = ("pil", "video", "np", "pt", "latent")
_OF_CLIPS = {"attention_injection": 0.0, "fresh_noise": 0.0, "strength": 1.0}
FPS = 8.0
"""Frames a second of clips that are made from random noise."""


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
    """A clip's latents at every noise level, for edits that start from its noise and follow it.

    Attributes:
        trajectory: From noise to the clean clip.
        caption: Conditions of what the clip shows.
        fps: Frames a second of the clip.
        sound_SC: Its sound; see `Video`.
    """

    trajectory: Trajectory
    caption: Conditions
    fps: float = FPS
    sound_SC: np.ndarray | None = None

    @property
    def noise(self) -> Tensor:
        """Latents `1 C T H W` at the noisiest level."""
        return self.trajectory.latents[:1]

    @property
    def clean(self) -> Tensor:
        """Latents `1 C T H W` of the clip itself."""
        return self.trajectory.latents[-1:]


_Stock: Any = object  # for type checkers: whichever stock pipeline it is mixed into


class _SeesClips(_Stock):
    """The part that both video pipelines add to their stock pipelines."""

    _attached: Attached | None = None
    _adapter: Adapter | None = None
    _run: RunFolder | None = None
    _base: str = ""
    _shipped: Any = None  # the base's scheduler, which gives way to the sampler of the settings; others are taken as is
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, base: str | Path, *, adapter: Adapter | str | Path | None = None, **kwargs: Any
    ) -> Self:
        """Open a base as diffusers does, with a run's adapter if one is given.

        Args:
            base: A name of `tuneavideo models`, a hub id, a folder or a single file.
            adapter: An `Adapter`, a run folder or its `adapter` folder; by default the one in a folder that
                `save_pretrained` made, if it has one.
            **kwargs: What `DiffusionPipeline.from_pretrained` takes (`dtype`, `variant`, `scheduler`, ...). With a
                `scheduler` that one samples; otherwise the `sampler` of the settings does.
        """
        pipe = load_stock_pipeline(str(base), super(), **kwargs)
        if pipe.unet.config.addition_embed_type and not issubclass(cls, StableDiffusionXLPipeline):
            raise ModelError(f"{base} is a Stable Diffusion XL: open it with TuneAVideoXLPipeline")
        pipe._base, pipe._shipped = str(base), None if "scheduler" in kwargs else pipe.scheduler
        saved = loading.folder(loading.source(str(base))) / "adapter"
        if adapter is None and saved.is_dir():
            adapter = saved
        if adapter is not None:
            pipe.load_video_adapter(adapter)
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the base as diffusers does, and the adapter into its folder `adapter`, where opening it finds it."""
        adapter, run = self._adapter, self._run
        self.unload_video_adapter()
        deflate(self.unet)
        try:
            super().save_pretrained(save_directory, **kwargs)
            if adapter:
                adapter.save(Path(save_directory) / "adapter", dtype=None)
        finally:
            if adapter:
                self.load_video_adapter(adapter)
                self._run = run

    def load_video_adapter(self, adapter: Adapter | str | Path) -> None:
        """Attach what a run learned; detaches another first. Calls and inversions then take the run's settings.

        Args:
            adapter: An `Adapter`, a run folder or its `adapter` folder.

        Raises:
            AdapterError: It is missing, damaged, or of another base.
        """
        self.unload_video_adapter()
        deflate(self.unet)
        run = None
        if not isinstance(adapter, Adapter):
            path = Path(adapter)
            run = next((each for each in (RunFolder(path), RunFolder(path.parent)) if each.settings.is_file()), None)
            adapter = Adapter.load(run.adapter if run else path)
        self._attached = adapter.attach(self.unet)
        self._adapter, self._run = adapter, run

    def unload_video_adapter(self) -> None:
        """Give the image UNet back, bit for bit."""
        if self._attached:
            self._attached.detach()
        self._attached = self._adapter = self._run = None

    @torch.no_grad()
    def invert(
        self,
        video: Video | None = None,
        num_inference_steps: int | None = None,
        *,
        prompt: str | None = None,
        **settings: Any,
    ) -> InvertedClip:
        """Find the noise a clip came from (DDIM inversion, empty prompt), to be given to a call as `latents`.

        Args:
            video: The clip, its sides multiples of the VAE's stride times 8; by default the one that the adapter was
                tuned on, if that is in a run folder.
            num_inference_steps: Steps up to the last noise level; by default those of the run or base. Call with the
                same number of steps.
            prompt: What the clip shows, for attention injection; by default the caption of the adapter.
            **settings: `timestep_spacing`, `window` and `window_overlap`, as in a call.

        Raises:
            SettingsError: No clip is given and there is none in a run folder, or a setting is unknown or wrong.
        """
        chosen = self._settings(_stated(settings, num_inference_steps=num_inference_steps))
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
        return InvertedClip(last.trajectory, caption, video.fps, video.sound_SC)

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
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> TuneAVideoPipelineOutput | tuple:
        """Edit an inverted clip, as `tuneavideo edit` does, or make clips from random noise; one per prompt.

        Settings that are not given are those of the adapter's run folder, or else of the base.

        Args:
            prompt: What each clip should show.
            num_frames: Frames of a clip that is made from random noise.
            height: Pixels of such a clip; by default what the base was trained at.
            width: Pixels of such a clip; by default what the base was trained at.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance; 1 or less is none.
            negative_prompt: What the clips should not show.
            num_videos_per_prompt: Clips of each prompt.
            generator: Of random noise, fresh noise and samplers that add noise; a list has one for each clip. The
                command line's seed n is `torch.Generator().manual_seed(n)`.
            latents: What `invert` returns; or noise to start from, `B C T H W` or `1 C T H W`.
            prompt_embeds: Text embedding `B L D`, instead of `prompt`.
            negative_prompt_embeds: The same, instead of `negative_prompt`.
            pooled_prompt_embeds: Goes with `prompt_embeds` in Stable Diffusion XL, `B D`.
            negative_pooled_prompt_embeds: Goes with `negative_prompt_embeds`.
            output_type: `pil`, `video` (a `Video`, which `tuneavideo.video.write` takes), `np`, `pt` or `latent`.
            return_dict: A `TuneAVideoPipelineOutput`, or a tuple of its fields.
            callback_on_step_end: Called with the pipeline, the step's index, its timestep and the tensors named by
                `callback_on_step_end_tensor_inputs`; tensors that it returns take their place. As in diffusers,
                `prompt_embeds` has the negative embeddings first while there is guidance.
            callback_on_step_end_tensor_inputs: Names out of `latents`, `prompt_embeds` and `negative_prompt_embeds`.
            **settings: Any other setting of `tuneavideo edit`: `attention_injection`, `strength`, `fresh_noise`,
                `guidance_interval`, `sampler`, `timestep_spacing`, `feature_reuse`, `batch_guidance`, `window`,
                `window_overlap`, `fps`. A `sampler` goes before the pipeline's own scheduler.

        Raises:
            SettingsError: A setting is unknown or wrong, or `latents` do not have the noise levels of the sampling.
            ValueError: Arguments contradict each other.
        """
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := {*callback_on_step_end_tensor_inputs} - {*self._callback_tensor_inputs}:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has to be in {self._callback_tensor_inputs}, found {unknown}"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type has to be in {OUTPUT_TYPES}, found {output_type!r}")
        stated = _stated(settings, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        inverted = latents if isinstance(latents, InvertedClip) else None
        chosen = self._settings(stated if inverted else _without_clip(stated))
        text, negative = self._conditions(
            prompt, chosen.negative_prompt if negative_prompt is None else negative_prompt,
            (prompt_embeds, pooled_prompt_embeds), (negative_prompt_embeds, negative_pooled_prompt_embeds),
        )  # fmt: skip
        text = text.repeated(num_videos_per_prompt)
        negative = negative.expand(len(text)) if len(negative) == 1 else negative.repeated(num_videos_per_prompt)
        if isinstance(generator, list) and len(generator) != len(text):
            raise ValueError(f"{len(generator)} generators for {len(text)} clips; give one for each, or one for all")
        sampler = self._sampler(stated, chosen)
        if isinstance(latents, InvertedClip):
            steps = self._edited(latents, chosen, sampler, text, negative, generator)
        else:
            start = self._start(latents, len(text), (num_frames, height, width), generator)
            unet = editing.prepared(self._video(), chosen, start.shape[2], reuse=chosen.feature_reuse)
            steps = sampling.generate(
                unet, sampler, start, text, negative, chosen.guidance_scale, batch_guidance=chosen.batch_guidance,
                guidance_interval=chosen.guidance_interval, generator=generator,
            )  # fmt: skip
        self._guidance_scale, self._interrupt, self._num_timesteps = (
            chosen.guidance_scale,
            False,
            len(sampler.timesteps),
        )
        made = None
        with self.progress_bar(total=self._num_timesteps) as bar:
            for index, step in enumerate(steps):
                if callback_on_step_end:
                    given = _given(step, callback_on_step_end_tensor_inputs)
                    changed = callback_on_step_end(self, index, sampler.timesteps[index], dict(given))
                    _take(step, given, changed or {})
                    step.guidance_scale, step.stop = self.guidance_scale, self.interrupt
                made = step.latents
                bar.update()
        assert made is not None, "a sampling has steps"
        fps = chosen.fps or (inverted.fps if inverted else FPS)
        heard = inverted is not None and math.isclose(fps, inverted.fps, rel_tol=1e-4)
        frames = self._pictured(made, output_type, fps, inverted.sound_SC if inverted and heard else None)
        self.maybe_free_model_hooks()
        return TuneAVideoPipelineOutput(frames=frames) if return_dict else (frames,)

    def _edited(
        self, clip: InvertedClip, chosen: Sampling, sampler: Sampler, text: Conditions, negative: Conditions,
        generator: Any,
    ) -> Iterator[EditStep]:  # fmt: skip
        device = self._execution_device
        trajectory = replace(clip.trajectory, latents=clip.trajectory.latents.to(device))
        unet = editing.prepared(self._video(), chosen, trajectory.latents.shape[2], reuse=chosen.feature_reuse)
        return editing.edit(
            unet, NoiseSchedule.of(self.scheduler), sampler, chosen, trajectory, trajectory.latents[-1:],
            clip.caption.to(device), text, negative, generator,
        )  # fmt: skip

    def _settings(self, stated: Mapping[str, Any]) -> Sampling:
        """Settings that are stated, over those of the run, or else of the base."""
        if self._run:
            own = self._run.read_settings().model_dump()
        else:
            names = (self._base, self._adapter.base if self._adapter else "")
            own = next((dict(BASES[name].settings) for name in names if name in BASES), {})
        dropped = {"seeds", "formats"} | ({"num_inv_steps"} if "num_inference_steps" in stated else set())
        own = {name: value for name, value in own.items() if name in {*Sampling.model_fields} - dropped}
        if self._samples_itself(stated):
            own |= {"sampler": "ddim", "timestep_spacing": None}  # its own; what it passes is checked later
        return checked(Sampling, {**own, **stated})

    def _samples_itself(self, stated: Mapping[str, Any]) -> bool:
        """Whether the user has chosen the scheduler, and no other sampler for this call."""
        return self.scheduler is not self._shipped and not {"sampler", "timestep_spacing"} & stated.keys()

    def _sampler(self, stated: Mapping[str, Any], chosen: Sampling) -> Sampler:
        if self._samples_itself(stated):
            return Sampler.of(self.scheduler, chosen.num_inference_steps, chosen.strength)
        return editing.sampler_of(NoiseSchedule.of(self.scheduler), chosen)

    def _tuned_clip(self) -> tuple[Video, Tensor]:
        """The clip of the adapter's run folder, and its latents as they were when it was tuned."""
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
    ) -> tuple[Conditions, Conditions]:
        """Conditions of what each clip should show, and of what it, or none, should not."""
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
        return text, without

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
        stride, frames = codec.stride(self), size[0]
        height, width = (side or codec.default_size(self) for side in size[1:])
        if height % stride or width % stride:
            raise ValueError(f"height and width have to be multiples of {stride}, found {height} and {width}")
        shape = (batch, self.unet.config.in_channels, frames, height // stride, width // stride)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _pictured(self, latents: Tensor, output_type: str, fps: float, sound_SC: np.ndarray | None) -> Any:
        if output_type == "latent":
            return latents
        clips_TCHW = [torch.stack([*codec.decode_pixels(self, each)]) for each in latents.split(1)]
        if output_type == "pt":
            return torch.stack(clips_TCHW)
        clips = [clip.permute(0, 2, 3, 1).numpy() for clip in clips_TCHW]
        if output_type == "np":
            return np.stack(clips)
        clips = [(clip * 255).round().astype(np.uint8) for clip in clips]
        if output_type == "video":
            return [Video(clip, fps, sound_SC) for clip in clips]
        return [[Image.fromarray(frame) for frame in clip] for clip in clips]


class TuneAVideoPipeline(_SeesClips, StableDiffusionPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Edits of clips, and clips from text, with a Stable Diffusion 1.x or 2.x base and a tuned adapter.

    Everything a `StableDiffusionPipeline` can do with its components (offload, VAE slicing and tiling,
    `load_lora_weights`, textual inversion, schedulers) works as there; its UNet is inflated in place. It serves one
    request at a time.
    """


class TuneAVideoXLPipeline(_SeesClips, StableDiffusionXLPipeline):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The same for a Stable Diffusion XL base."""


def _listed(prompt: str | list[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else prompt


def _stated(settings: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {name: value for name, value in {**settings, **more}.items() if value is not None}


def _without_clip(stated: dict[str, Any]) -> dict[str, Any]:
    """Settings of a sampling that no clip is inverted for. Raises SettingsError for those that need one."""
    for name, idle in _OF_CLIPS.items():
        if stated.get(name, idle) != idle:
            raise SettingsError(f"{name} {stated[name]} needs an inverted clip: give what invert returns as latents")
    return stated | _OF_CLIPS


def _given(step: EditStep, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors that a callback is given."""
    text, negative = step.text.text_BLD, step.negative.text_BLD
    both = torch.cat([negative, text]) if step.guidance_scale > 1 else text
    tensors = {"latents": step.latents, "prompt_embeds": both, "negative_prompt_embeds": negative}
    return {name: tensors[name] for name in names}


def _take(step: EditStep, given: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> None:
    """Put the tensors that a callback returned into the places of those it was given."""
    step.latents = changed.get("latents", step.latents)
    texts = changed.get("prompt_embeds", step.text.text_BLD)
    if len(texts) == 2 * len(step.latents):
        negative, texts = texts.chunk(2)
        step.negative = replace(step.negative, text_BLD=negative)
    step.text = replace(step.text, text_BLD=texts)
    negative = changed.get("negative_prompt_embeds")
    if negative is not None and negative is not given.get("negative_prompt_embeds"):
        step.negative = replace(step.negative, text_BLD=negative)
