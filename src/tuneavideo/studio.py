"""What it takes to make edits: a tuned (or half-tuned) model with the clip it was tuned on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuneavideo import cache, editing, inversion, models, streaming
from tuneavideo import video as videos
from tuneavideo.errors import SettingsError
from tuneavideo.inflate import VideoUNet
from tuneavideo.noise import Levels, Sampler
from tuneavideo.opening import Pipeline
from tuneavideo.progress import Progress
from tuneavideo.reels import Reel
from tuneavideo.reuse import reusing
from tuneavideo.runs import RunFolder
from tuneavideo.settings import Sampling
from tuneavideo.style import Style
from tuneavideo.video import Spool, Video
from tuneavideo.windows import WindowedUNet, Windows

Footage = Video | Spool
Moments = Mapping[str, Tensor | Reel]


@dataclasses.dataclass
class Studio:
    """See the module; `run` is where inversions are kept, `moments` are the clip's latents."""

    run: RunFolder
    pipe: Pipeline
    video: VideoUNet
    moments: Moments
    source: Footage
    keep_inversions: bool = True
    recent: dict[Path, Tensor | Reel] = dataclasses.field(default_factory=dict)
    style: Style = dataclasses.field(default_factory=Style)

    def sampler(self, settings: Sampling) -> Sampler:
        return Levels.of(self.pipe.scheduler).sampler(
            settings.sampler,
            settings.num_inference_steps,
            spacing=settings.timestep_spacing,
            strength=settings.strength,
        )

    def edited(self, wishes: Sequence[tuple[str, int]], settings: Sampling) -> Generator[Progress, None, list[Footage]]:
        """Invert, denoise towards each prompt (with its seed) in one batch, decode."""
        sampler = self.sampler(settings)
        way = yield from self.inverted(sampler, settings)
        if isinstance(way, Reel):
            return (yield from self._edited_by_frames(way, wishes, settings))
        generators = [torch.Generator().manual_seed(seed) for _, seed in wishes]
        share, clean = settings.fresh_noise, self._clean()
        starts = [editing.mix_noise(way[:1], clean, sampler.start_alpha, share, each) for each in generators]
        prompts = [prompt for prompt, _ in wishes]
        told = self.style.told(models.embed(self.pipe, [settings.negative_prompt, *prompts]))
        negative, text = told.split([1, len(prompts)])
        latents = torch.cat(starts)
        steps = editing.generate(
            self._windowed(settings, settings.feature_reuse), sampler, latents, text, negative.expand(len(prompts)),
            settings.guidance_scale, batch_guidance=settings.batch_guidance,
            guidance_interval=settings.guidance_interval, source=self._followed(way, settings),
            generator=generators if len(generators) > 1 else generators[0],
        )  # fmt: skip
        for step in steps:
            latents = step.latents
            yield Progress("edit", step.number, step.total, about=" | ".join(prompts))
        return [self._timed(clip) for clip in models.decode(self.pipe, latents, settings.fps or self.source.fps)]

    def _edited_by_frames(
        self, way: Reel, wishes: Sequence[tuple[str, int]], settings: Sampling
    ) -> Generator[Progress, None, list[Footage]]:
        """The same of a clip on the disk, one edit after the other."""
        clips: list[Footage] = []
        for prompt, seed in wishes:
            sampler, generator, folder = self.sampler(settings), torch.Generator().manual_seed(seed), self.run.path
            negative, text = self.style.told(models.embed(self.pipe, [settings.negative_prompt, prompt])).split(1)
            start, clean, share = way.split(1)[0], self._clean(), settings.fresh_noise
            start = streaming.mix_noise(start, clean, sampler.start_alpha, share, generator, folder=folder)
            steps = streaming.generate(
                self._windowed(settings, settings.feature_reuse), sampler, start, text, negative,
                settings.guidance_scale, batch_guidance=settings.batch_guidance,
                guidance_interval=settings.guidance_interval, source=self._followed(way, settings),
                generator=generator, folder=folder,
            )  # fmt: skip
            for step in steps:
                start = step.latents
                yield Progress("edit", step.number, step.total, about=prompt)
            images, fps = models.decoded(self.pipe, start), settings.fps or self.source.fps
            clips.append(self._timed(videos.shelved(images, self.source.frames, fps, folder)))
        return clips

    def _windowed(self, settings: Sampling, reuse: int = 1) -> Any:
        """The UNet, called in windows if one does not hold the clip."""
        windows, frames = Windows.of(settings, self.source.frames), self.source.frames
        if windows.holds(frames) and isinstance(self.source, Video):
            return reusing(self.video, reuse)
        for name, stated in (("feature_reuse", reuse > 1), ("controlnet", self.video.control)):
            if stated:
                raise SettingsError(
                    f"{name} does not go with a clip that is edited in windows ({frames} frames, windows of "
                    f"{windows.size}) or from the disk; leave it out, or take fewer frames"
                )
        return WindowedUNet(self.video, windows)

    def _timed(self, edit: Footage) -> Footage:
        """An edit with the source's sound, if it plays as fast as the source."""
        same = math.isclose(edit.fps, self.source.fps, rel_tol=1e-4)
        return dataclasses.replace(edit, sound_SC=self.source.sound_SC if same else None)

    def inverted(self, sampler: Sampler, settings: Sampling) -> Generator[Progress, None, Tensor | Reel]:
        """The clip's noise at the level where the sampler starts, `1 C T H W`; computed once, kept in the run folder.

        If edits follow the clip, what it is at the following levels comes after it.
        """
        levels = Levels.of(self.pipe.scheduler)
        timesteps = inversion.path_to(sampler, levels, settings.inversion_steps, settings.timestep_spacing)
        file = self.inversion_file(sampler, settings)
        if file in self.recent:
            return self.recent[file]
        clean, whole = self._clean(), bool(settings.attention_injection)
        if self.keep_inversions and (kept := cache.read(file, by_frames=isinstance(clean, Reel))):
            return kept["latents"].to(clean.device)
        video, empty = self._windowed(settings), self.style.told(models.embed(self.pipe, [""]))
        if isinstance(clean, Reel):
            latents, folder = clean, self.run.path
            for step in streaming.invert(video, levels, clean, empty, timesteps, whole=whole, folder=folder):
                latents = step.latents
                yield Progress("invert", step.number, step.total)
        else:
            way = [clean]
            for step in inversion.invert(video, levels, clean, empty, timesteps):
                way = [*way, step.latents] if whole else [step.latents]
                yield Progress("invert", step.number, step.total)
            latents = torch.cat(way[::-1])
        if self.keep_inversions:
            cache.write(file, {"latents": latents})
        self.recent[file] = latents
        return latents

    def _followed(self, way: Tensor | Reel, settings: Sampling) -> editing.Source | None:
        if not settings.attention_injection:
            return None
        caption = self.style.told(models.embed(self.pipe, [self.run.read_settings().prompt]))
        return editing.Source(way.split(1), caption, settings.attention_injection)

    def inversion_file(self, sampler: Sampler, settings: Sampling) -> Path:
        levels = Levels.of(self.pipe.scheduler)
        timesteps = inversion.path_to(sampler, levels, settings.inversion_steps, settings.timestep_spacing)
        whole = ["whole"] if settings.attention_injection else []
        windows = Windows.of(settings, self.source.frames)
        cut = [] if windows.holds(self.source.frames) else [dataclasses.astuple(windows)]
        parts = (timesteps, self.moments["mean"], str(self.pipe.unet.dtype), *whole, *self.style.marks, *cut)
        return self.run.inversion(cache.key(*parts))

    def _clean(self) -> Any:
        return self.moments["mean"].to(self.pipe._execution_device)
