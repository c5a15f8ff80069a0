"""The jobs behind the API, as generators: run folder and models in, files of the run out."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import logging
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from torch import Tensor

from tuneavideo import budget, cache, editing, files, inversion, models, streaming
from tuneavideo import style as styles
from tuneavideo import video as videos
from tuneavideo.adapter import Adapter, fingerprint
from tuneavideo.conditions import Conditions
from tuneavideo.errors import MemoryShort, MissingExtra, RunError, SettingsError
from tuneavideo.inflate import VideoUNet, inflate
from tuneavideo.keeping import Keeper
from tuneavideo.montage import contact_sheet, side_by_side
from tuneavideo.noise import Levels, Sampler
from tuneavideo.opening import Pipeline
from tuneavideo.progress import Job, Progress
from tuneavideo.reels import Reel
from tuneavideo.reuse import reusing
from tuneavideo.runs import RunFolder
from tuneavideo.settings import EditSettings, Sampling, TuneSettings
from tuneavideo.style import Style
from tuneavideo.tuning import Tuning
from tuneavideo.video import Spool, Video
from tuneavideo.windows import WindowedUNet, Windows

Footage = Video | Spool
Moments = Mapping[str, Tensor | Reel]
PACKAGES = ("tuneavideo", "torch", "diffusers", "transformers", "accelerate", "av")

logger = logging.getLogger(__name__)


def tune(settings: TuneSettings, *, out: str | Path | None = None, resume: str | Path | None = None) -> Job:
    """See `api.tuning`."""
    done = _edits_done(settings, RunFolder.open(resume)) if resume else set()
    accelerator = _accelerator(settings)
    with _claimed(settings, accelerator, out, resume) as run, _memory_told(settings):
        yield Progress("open", path=run.path, about=settings.base)
        if not run.is_tuned:
            yield from _learned(settings, accelerator, run)
        gc.collect()  # accelerate's wrapper for half precision is part of a cycle
        if settings.edit and accelerator.is_main_process:
            sampling = run.read_settings().model_dump(include=set(Sampling.model_fields))
            yield from _edited(EditSettings(run=str(run.path), prompt=settings.edit, **sampling), done)


def _edits_done(settings: TuneSettings, run: RunFolder) -> set[tuple[str, int]]:
    """Edits that a run has which is resumed; refuses one that has them all."""
    done = run.edited() if run.is_tuned else set()
    if run.is_tuned and done >= set(product(settings.edit, settings.seeds)):
        raise RunError(f"{run.path} is tuned to its end; edit it, or tune for more steps in a new run")
    return done


def _learned(settings: TuneSettings, accelerator: Accelerator, run: RunFolder) -> Job:
    """Tune and save."""
    pipe = models.open_image_model(settings.base, dtype=models.PRECISIONS[accelerator.mixed_precision])
    _warn_of_cuts(pipe, (settings.prompt, *settings.edit))
    kept = _kept(run)
    clip, moments = kept or (clip_of(settings, pipe, run.path), None)
    marks = fingerprint(pipe.unet)
    settings, line = _budgeted(settings, accelerator, pipe, clip)
    if line:
        yield Progress("memory", about=line)
    if settings.offload:
        models.offload(pipe)
    yield Progress("encode", path=run.path)
    with accelerator.main_process_first():
        moments = moments or moments_of(pipe, clip, run.latents)
        text, empty = _text(pipe, settings.prompt), _text(pipe, "")
    video = inflate(pipe.unet, settings.inflation, seed=settings.seed)
    tuning = Tuning(video, Levels.of(pipe.scheduler), moments, text, settings, accelerator, empty)
    keeper = Keeper(run, tuning, accelerator)
    if accelerator.is_main_process:
        keeper.check_room(clip)
        run.write_settings(settings, _versions() | {"base fingerprint": cache.key(marks)})
        if not kept and isinstance(clip, Video):
            cache.write(run.latents, moments)
        if not run.source.is_file():
            videos.write(clip, run.source)
    keeper.resume()
    _report_to(settings, accelerator, run)
    video = VideoUNet(accelerator.unwrap_model(tuning.video.unet), video.clip)
    yield from _tuned(keeper, _Studio(run, pipe, video, moments, clip, keep_inversions=False))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.free_memory()
    if accelerator.is_main_process:
        files.write(run.card, _card(settings, run))
        Adapter.of(
            video.unet,
            tuning.learned(),
            inflation=settings.inflation,
            base=settings.base,
            fingerprint=marks,
            about={"prompt": settings.prompt, "steps": tuning.number} | _versions(),
        ).save(run.adapter)
        run.drop_checkpoints()
        yield Progress("tune", tuning.number, settings.max_train_steps, path=run.path)


def demo(settings: TuneSettings, *, out: str | Path | None = None) -> Job:
    """See `api.demoing`."""
    rows: list[Path] = []
    for each in tune(settings, out=out):
        yield each
        if each.path and each.stage in ("tune", "edit"):
            rows.append(each.path / "edit.mp4" if each.stage == "edit" else RunFolder(each.path).source)
    if rows:  # the first process has them all, others none
        sheet = RunFolder(rows[0].parent).sheet
        clips = [videos.read(path) for path in rows]
        videos.write_image(contact_sheet(clips, [settings.prompt, *settings.edit]), sheet)
        yield Progress("picture", path=sheet)


def edit(settings: EditSettings) -> Job:
    """See `api.editing`."""
    run = RunFolder.open(settings.run)
    with run.locked(), _memory_told(run.read_settings(), settings):
        yield from _edited(settings)


def _edited(settings: EditSettings, done: Set[tuple[str, int]] = frozenset()) -> Job:
    """Edits with every prompt and seed but those that are `done`."""
    yield Progress("open", about=settings.run)
    studio = _reopened(settings)
    _warn_of_cuts(studio.pipe, (*settings.prompt, settings.negative_prompt))
    due = [each for each in product(settings.prompt, settings.seeds) if each not in done]
    for batch in batched(due, settings.batch_prompts):
        clips = yield from studio.edited(batch, settings)
        for (prompt, seed), video in zip(batch, clips, strict=True):
            folder = _write_edit(studio, settings, prompt, seed, video)
            yield Progress("edit", path=folder, about=prompt)


def batched(wishes: Sequence[tuple[str, int]], size: int) -> Iterator[Sequence[tuple[str, int]]]:
    """One part of `size` after the other; the last may be smaller."""
    return (wishes[at : at + size] for at in range(0, len(wishes), size))


def invert(settings: EditSettings) -> Job:
    """See `api.inverting`."""
    run = RunFolder.open(settings.run)
    with run.locked(), _memory_told(run.read_settings(), settings):
        yield Progress("open", about=settings.run)
        studio = _reopened(settings)
        sampler = studio.sampler(settings)
        yield from studio.inverted(sampler, settings)
        yield Progress("invert", path=studio.inversion_file(sampler, settings))


@dataclasses.dataclass
class _Studio:
    """A tuned (or half-tuned) model with the clip it was tuned on: what it takes to make edits."""

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
            images = models.decoded(self.pipe, start)
            clips.append(self._timed(videos.shelved(images, settings.fps or self.source.fps, folder)))
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


def _tuned(keeper: Keeper, studio: _Studio) -> Job:
    """Tune to the end, with checkpoints and previews; a job that is closed early keeps its last step."""
    settings = keeper.tuning.settings
    try:
        yield from _previewed(keeper, studio)
        for step in keeper.tuning:
            keeper.log(step)
            if step.number % settings.checkpointing_steps == 0:
                keeper.checkpoint()
            yield Progress("tune", step.number, settings.max_train_steps, step)
            yield from _previewed(keeper, studio)
    except GeneratorExit:
        keeper.checkpoint()
        raise
    except RunError:
        keeper.forget()
        raise


def _previewed(keeper: Keeper, studio: _Studio) -> Job:
    """The previews that are due at this step and not there yet."""
    tuning, settings = keeper.tuning, keeper.tuning.settings
    due = settings.validation_steps and tuning.number % settings.validation_steps == 0
    studio.recent.clear()  # the weights have moved since
    for prompt in settings.edit if due and keeper.accelerator.is_main_process else ():
        path = keeper.run.sample(tuning.number, prompt)
        if path.is_file():
            continue
        for_preview = studio.edited([(prompt, settings.seeds[0])], settings)
        with tuning.averaged():
            [video] = yield from _relabelled(for_preview, "preview")
        videos.write(side_by_side([studio.source, video], labels=[settings.prompt, prompt]), path)
        yield Progress("preview", path=path, about=prompt)


def _relabelled(work: Generator[Progress, None, list[Footage]], stage: str) -> Generator[Progress, None, list[Footage]]:
    while True:
        try:
            yield dataclasses.replace(next(work), stage=stage)
        except StopIteration as done:
            return done.value


def _accelerator(settings: TuneSettings) -> Accelerator:
    AcceleratorState._reset_state()  # accelerate keeps the precision of the process's first job otherwise
    options: dict[str, Any] = {"cpu": not torch.accelerator.is_available()}  # else processes do not meet on a CPU
    if settings.report_to:  # where to, _report_to says when there is a folder
        options |= {"log_with": settings.report_to, "project_config": ProjectConfiguration(logging_dir="logs")}
        if not importlib.util.find_spec(settings.report_to):
            raise MissingExtra(f"report_to={settings.report_to}", settings.report_to)
    return Accelerator(mixed_precision=_precision(settings), **options)


def _precision(settings: TuneSettings) -> str:
    return models.precision(settings.mixed_precision, low=settings.memory is not None)


def _kept(run: RunFolder) -> tuple[Footage, Moments] | None:
    """Clip and latents of a run that was begun; None if one is missing or damaged."""
    if not (run.latents.is_file() and run.source.is_file()):
        return None
    clip = videos.footage(run.source, run.path)
    moments = cache.read(run.latents, by_frames=isinstance(clip, Spool))
    return (clip, moments) if moments else None


def clip_of(settings: TuneSettings, pipe: Pipeline, folder: Path) -> Footage:
    """The frames to learn from, at a size the model takes; a long clip lies in a file in `folder`."""

    def near(width: int, height: int) -> tuple[int, int]:
        side = settings.resolution or models.default_size(pipe)
        shape = (1, 1) if settings.fit == "stretch" else (width, height)
        return videos.area_size(*shape, area=side**2, multiple=models.stride(pipe) * 8)

    size = near
    if settings.width and settings.height:
        size = _taken(settings.width, settings.height, models.stride(pipe))
    clip = videos.footage(
        settings.video, folder, start=settings.start, stride=settings.stride, count=settings.num_frames,
        start_time=settings.start_time, sample_fps=settings.sample_fps, size=size, fit=settings.fit,
    )  # fmt: skip
    _refuse_fast_gif(settings, clip)
    return clip


def _refuse_fast_gif(settings: Sampling, source: Footage) -> None:
    fps = settings.fps or source.fps
    if "gif" in settings.formats and fps > videos.FASTEST_GIF:
        raise SettingsError(
            f"formats: a GIF shows at most {videos.FASTEST_GIF} frames a second, the edits would have {fps:g}; set fps"
        )


def _taken(width: int, height: int, multiple: int) -> tuple[int, int]:
    near = [max(1, round(side / multiple)) * multiple for side in (width, height)]
    if near != [width, height]:
        raise SettingsError(
            f"width {width}, height {height}: this base takes multiples of {multiple}; nearest is {near[0]} x {near[1]}"
        )
    return width, height


@contextmanager
def _claimed(
    settings: TuneSettings, accelerator: Accelerator, out: str | Path | None, resume: str | Path | None
) -> Generator[RunFolder, None, None]:
    """One folder for all processes, made and locked by the first.

    A mistake leaves no new folder behind; what interrupts a tuning later leaves one to go on with, and says how.
    """
    made: list[Any] = [None]
    with ExitStack() as held:
        if accelerator.is_main_process:
            made = [RunFolder.open(resume) if resume else RunFolder.create(settings.video, out)]
            held.enter_context(made[0].locked())
        broadcast_object_list(made)
        run: RunFolder = made[0]
        try:
            if accelerator.is_main_process:
                run.write_settings(settings, _versions())
            yield run
        except Exception as error:
            if run.source.is_file():
                error.add_note(f"go on with: tuneavideo tune --resume {run.quoted}")
            elif accelerator.is_main_process and not resume:
                run.remove()
            raise


@contextmanager
def _memory_told(own: TuneSettings, edits: Sampling | None = None) -> Generator[None, None, None]:
    """Say what to lower when memory is at its end: in tuning with settings `own`, or in `edits` of that run."""
    try:
        yield
    except Exception as error:
        if not models.is_out_of_memory(error):
            raise
        device = torch.device(PartialState().device or "cpu")
        free, total = models.memory_left(device)
        size = f"width x height (now {own.width} x {own.height})" if own.width else (
            f"resolution (now {own.resolution or 'that of the base'})"
        )  # fmt: skip
        advice = [f"lower num_frames (now {own.num_frames}) or {size}"]
        if not edits and own.train_batch_size > 1:
            advice.append(f"lower train_batch_size (now {own.train_batch_size})")
        if not edits and not own.gradient_checkpointing:
            advice.append("turn gradient_checkpointing on (now off)")
        if (edits or own).batch_guidance:
            advice.append("turn batch_guidance off (now on)")
        raise MemoryShort(
            f"out of memory: this process holds {files.size(models.memory(device))}, {files.size(free)} of "
            f"{files.size(total)} are free on {device}; {', or '.join(advice)}"
        ) from error


def _budgeted(
    settings: TuneSettings, accelerator: Accelerator, pipe: Pipeline, clip: Footage
) -> tuple[TuneSettings, str]:
    """Settings that fit into the memory given, or that of the GPU, and what there is to tell of them."""
    on_gpu = accelerator.device.type == "cuda"
    if not (settings.memory or on_gpu):
        return settings, ""
    room = settings.memory * budget.GB if settings.memory else float(models.memory_left(accelerator.device)[1])
    model = budget.Model.of(pipe, settings, models.PRECISIONS[accelerator.mixed_precision].itemsize)
    size, stride = (clip.frames, clip.height, clip.width), models.stride(pipe)
    plan = budget.chosen(settings, model, room, size, stride)
    if settings.memory and not settings.mixed_precision:
        plan = plan.model_copy(update={"mixed_precision": accelerator.mixed_precision})
    return plan, budget.told(settings, plan, model, room, size, stride)


def _report_to(settings: TuneSettings, accelerator: Accelerator, run: RunFolder) -> None:
    if settings.report_to:
        options = settings.model_dump(mode="json")
        plain = {name: value for name, value in options.items() if isinstance(value, int | float | str | bool)}
        accelerator.project_configuration.logging_dir = str(run.logs)
        accelerator.init_trackers("tuneavideo", config=plain)


def moments_of(pipe: Pipeline, clip: Footage, path: Path) -> Moments:
    """Latents of a clip, from the cache; those of a clip on the disk lie in `path` and nowhere else."""
    if isinstance(clip, Spool):
        if not cache.read(path, by_frames=True):  # another process may have been first
            streaming.encode(pipe, clip, path)
        return cache.read(path, by_frames=True) or {}
    name = cache.key("moments", clip.frames_THWC, pipe.vae.config.scaling_factor, pipe.vae)
    return cache.cached(name, lambda: models.encode(pipe, clip))


def _text(pipe: Pipeline, prompt: str) -> Conditions:
    encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    name = cache.key("text", pipe.tokenizer(prompt).input_ids, *encoders)
    tensors = cache.cached(name, lambda: models.embed(pipe, [prompt]).tensors())
    return Conditions(**tensors, stride=models.stride(pipe))


def _reopened(settings: EditSettings) -> _Studio:
    """The model a run made, with the clip it was made on."""
    run = RunFolder.open(settings.run)
    own = run.read_settings()
    if not run.is_tuned:
        raise RunError(f"{run.path} is not tuned to its end; go on with: tuneavideo tune --resume {run.quoted}")
    dtype = models.PRECISIONS[_precision(own)]
    pipe = models.open_image_model(settings.edit_model or own.base, dtype=dtype)
    kept = _kept(run)
    source, moments = kept or (videos.footage(run.source, run.path), {})
    if isinstance(source, Spool) and settings.controlnet:
        raise SettingsError(f"controlnet does not go with a clip of {source.frames} frames, which lies on the disk")
    style = styles.load(pipe, settings, source)
    video = Adapter.load(run.adapter).attach(pipe.unet, any_base=settings.edit_model is not None).video
    _refuse_fast_gif(settings, source)
    if not moments:
        logger.warning("%s is missing or damaged; made again from %s", run.latents, run.source.name)
        moments = moments_of(pipe, source, run.latents)
        if isinstance(source, Video):
            cache.write(run.latents, moments)
    if own.offload:
        models.offload(pipe)
    return _Studio(run, pipe, style.controlled(video), moments, source, style=style)


def _write_edit(studio: _Studio, settings: EditSettings, prompt: str, seed: int, video: Footage) -> Path:
    folder = studio.run.new_edit(prompt)
    for kind in settings.formats:
        videos.write(video, folder / ("frames" if kind == "frames" else f"edit.{kind}"))
    source = dataclasses.replace(studio.source, fps=video.fps, sound_SC=video.sound_SC)
    labels = [studio.run.read_settings().prompt, prompt]
    videos.write(side_by_side([source, video], labels=labels), folder / "side-by-side.mp4")
    made = settings.model_dump(mode="json", exclude={"prompt", "seeds", "run"})
    files.write(folder / "edit.json", json.dumps({"prompt": prompt, "seed": seed} | made, indent=1))
    return folder


def _warn_of_cuts(pipe: Pipeline, prompts: Iterable[str]) -> None:
    for prompt in prompts:
        if cut := models.cut(pipe, prompt):
            logger.warning("the prompt %r is longer than the text encoder takes; left out: %r", prompt, cut)


def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def _card(settings: TuneSettings, run: RunFolder) -> str:
    """The model card of a run."""
    return f"""---
base_model: {settings.base}
library_name: tuneavideo
tags: [tune-a-video, video-editing, one-shot-tuning]
---
# {run.path.name}

A [Tune-A-Video](https://arxiv.org/abs/2212.11565) adapter: the motion of one clip
("{settings.prompt}", `source.mp4`), learned by `{settings.base}` in {settings.max_train_steps} steps
with the preset `{settings.preset}`. The base itself is not in here.

    tuneavideo edit {run.path} --prompt "a new prompt"

All settings and versions are in `settings.yaml`, the loss of every step in `steps.jsonl`.
"""
