"""Edit sessions: a tuned model with the clip it was tuned on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tuneavideo import video as videos
from tuneavideo.method import consistency, editing, graphs, inversion
from tuneavideo.method.changes import edit_masks
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.editing import Trajectory
from tuneavideo.method.inflate import VideoUNet
from tuneavideo.method.noise import NoiseSchedule
from tuneavideo.method.sampling import EditStep
from tuneavideo.method.windows import Windows
from tuneavideo.models import codec
from tuneavideo.models.addons import AddOns
from tuneavideo.models.loading import Pipeline
from tuneavideo.progress import Progress
from tuneavideo.settings import Sampling
from tuneavideo.storage import cache, tensors
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import AnyVideo, Video
from tuneavideo.video.flow import neighbour_flows
from tuneavideo.video.masks import Mask

Moments = Mapping[str, Tensor]
PICTURED = 4  # frames of a picture while sampling


@dataclasses.dataclass
class EditSession:
    """A tuned or partly tuned model and its clip, from which edits are made.

    Attributes:
        run: Run folder, which keeps the inversions.
        pipe: Loaded base.
        video: Its inflated UNet.
        moments: `mean` and `std` of the clip's latents, `1 C T H W` each.
        source: The clip.
        keep_inversions: Whether inversions are written to the run folder.
        recent: Inversions of this session, by file.
        addons: LoRAs, ControlNet and the like that are loaded.
        mask: Where edits may change the clip; everywhere if None.
        step: Step of the tuning that the weights are of; the last if None.
    """

    run: RunFolder
    pipe: Pipeline
    video: VideoUNet
    moments: Moments
    source: AnyVideo
    keep_inversions: bool = True
    recent: dict[Path, Trajectory] = dataclasses.field(default_factory=dict)
    addons: AddOns = dataclasses.field(default_factory=AddOns)
    mask: Mask | None = None
    step: int | None = None

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Noise levels of the base."""
        return NoiseSchedule.of(self.pipe.scheduler)

    def edit(
        self, requests: Sequence[tuple[str, int]], settings: Sampling
    ) -> Generator[Progress, None, list[AnyVideo]]:
        """Invert, denoise towards each prompt (with its seed) in one batch, and decode."""
        trajectory = yield from self.invert(settings)
        clean, caption = self._clean(), self._embedded([self.run.read_settings().prompt])
        prompts = [prompt for prompt, _ in requests]
        negative, text = self._embedded([settings.negative_prompt, *prompts]).split([1, len(prompts)])
        masks: list[Mask | None] = [self.mask] * len(prompts)
        if settings.keep:
            known = trajectory, caption, text, self._embedded([""])
            masks = edit_masks(self.source, self.mask, self._prepared(settings), *known)
        latents, steps = clean, editing.edit(
            self._prepared(settings, settings.feature_reuse), self.noise_schedule,
            editing.sampler_of(self.noise_schedule, settings), settings, trajectory, clean, caption, text, negative,
            [torch.Generator().manual_seed(seed) for _, seed in requests],
            flows=self._flows if settings.temporal_consistency else (), mask=codec.latent_masks(masks, clean),
        )  # fmt: skip
        for step in steps:
            latents = step.latents
            words = " | ".join(prompts)
            yield Progress("edit", step.number, step.total, about=words, picture=partial(self._picture, step))
        return [self._decoded(*each, settings) for each in zip(latents.split(1), masks, strict=True)]

    def _picture(self, step: EditStep) -> np.ndarray:
        """Decode a few frames of the clean latents that a step predicts: edits below each other, `H W 3`."""
        predicted = step.clean(self.noise_schedule)
        frames = predicted.shape[2]
        chosen = sorted({round(at * (frames - 1) / max(1, PICTURED - 1)) for at in range(PICTURED)})
        rows = [codec.decode_frames(self.pipe, each, None) for each in predicted[:, :, chosen].split(1)]
        return np.concatenate([np.concatenate([*row], axis=1) for row in rows])

    @cached_property
    def _flows(self) -> list[np.ndarray]:
        """Motion of the clip in the run folder, which is the same for the edits at once and later."""
        clip = videos.read_any(self.run.source, self.run.path)
        height, width = self.moments["mean"].shape[3:]
        return neighbour_flows(clip.images, height, width, consistency.RADIUS)

    @cached_property
    def _recorded(self) -> VideoUNet:
        return graphs.recording(self.video)

    def _prepared(self, settings: Sampling, reuse: int = 1) -> Any:
        return editing.prepared(self._recorded, settings, self.source.frames, reuse=reuse)

    def _embedded(self, prompts: list[str]) -> Conditions:
        return self.addons.with_reference(codec.embed(self.pipe, prompts))

    def _decoded(self, latents: Tensor, mask: Mask | None, settings: Sampling) -> AnyVideo:
        """Decode an edit; it has the source's sound if it has the source's frame rate."""
        fps = settings.fps or self.source.fps
        edit = videos.collect(codec.decode_frames(self.pipe, latents, mask), fps, self.run.path)
        same = math.isclose(fps, self.source.fps, rel_tol=1e-4)
        return dataclasses.replace(edit, sound_SC=self.source.sound_SC if same else None)

    def invert(self, settings: Sampling) -> Generator[Progress, None, Trajectory]:
        """Invert the clip up to the timestep where sampling starts, or read the inversion from the run folder.

        Returns:
            Latents at that timestep; with attention injection or a mask at every timestep.
        """
        timesteps, whole, clean = self._path(settings), bool(settings.needs_trajectory), self._clean()
        file, is_long = self.inversion_file(settings), not isinstance(self.source, Video)
        if file in self.recent:
            return self.recent[file]
        kept = cache.read(file) if self.keep_inversions else None
        if kept:
            passed = tuple(timesteps[::-1] if whole else timesteps[-1:])
            return Trajectory(kept["latents"].to("cpu" if is_long else clean.device), passed)
        video, empty, out, step = self._prepared(settings), self._embedded([""]), None, None
        if is_long and whole:
            out = tensors.mapped((len(timesteps) + 1, *clean.shape[1:]), self.run.path)
        for step in editing.invert(video, self.noise_schedule, clean, empty, timesteps, whole=whole, out=out):
            yield Progress("invert", step.number, step.total)
        assert step, "an inversion has steps"
        self.recent[file] = step.trajectory
        if self.keep_inversions:
            cache.write(file, {"latents": self.recent[file].latents})
        return self.recent[file]

    def inversion_file(self, settings: Sampling) -> Path:
        """Return the file of the inversion for these settings."""
        whole = ["whole"] if settings.needs_trajectory else []
        windows = Windows.of(settings, self.source.frames)
        cut = [] if windows.holds(self.source.frames) else [dataclasses.astuple(windows)]
        weights = str(self.pipe.unet.dtype)
        at = [] if self.step is None else [f"step {self.step}"]
        parts = (self._path(settings), self.moments["mean"], weights, *whole, *self.addons.fingerprint, *cut, *at)
        return self.run.inversion(cache.key(*parts))

    def _path(self, settings: Sampling) -> list[int]:
        """Timesteps of the inversion."""
        sampler = editing.sampler_of(self.noise_schedule, settings)
        return inversion.path_to(sampler, self.noise_schedule, settings.inversion_steps, settings.timestep_spacing)

    def _clean(self) -> Any:
        return self.moments["mean"].to(self.pipe._execution_device)
