"""The jobs behind the API, as generators: run folder and models in, files of the run out."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import math
import pickle
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from diffusers import StableDiffusionPipeline
from torch import Tensor

from tuneavideo import cache, editing, inversion, models
from tuneavideo import video as videos
from tuneavideo.adapter import Adapter, fingerprint
from tuneavideo.errors import MissingExtra, RunError, SettingsError
from tuneavideo.inflate import VideoUNet, inflate, video_unet
from tuneavideo.montage import contact_sheet, side_by_side
from tuneavideo.noise import Levels, Sampler
from tuneavideo.progress import Job, Progress, Step
from tuneavideo.runs import RunFolder, write_text
from tuneavideo.settings import EditSettings, Sampling, TuneSettings
from tuneavideo.tuning import Tuning
from tuneavideo.video import Video

PACKAGES = ("tuneavideo", "torch", "diffusers", "transformers", "accelerate", "av")


def tune(settings: TuneSettings, *, out: str | Path | None = None, resume: str | Path | None = None) -> Job:
    """See `api.tuning`."""
    if resume and RunFolder.open(resume).is_tuned:
        yield from _remaining_edits(settings, RunFolder(Path(resume)))
        return
    run = yield from _learned(settings, out, resume)
    gc.collect()  # accelerate's wrapper for half precision is part of a cycle
    if run:
        yield from _edits(settings, run, settings.edit)


def _learned(
    settings: TuneSettings, out: str | Path | None, resume: str | Path | None
) -> Generator[Progress, None, RunFolder | None]:
    """Tune and save; returns the run folder to the first process, nothing to others."""
    yield Progress("open", about=settings.base)
    accelerator = _accelerator(settings)
    pipe = models.open_image_model(settings.base, dtype=models.PRECISIONS[accelerator.mixed_precision])
    clip = (_used(RunFolder(Path(resume))) if resume else None) or _clip(settings, pipe)
    run = _run_folder(settings, accelerator, out, resume)
    marks = fingerprint(pipe.unet)
    if accelerator.is_main_process:
        run.write_settings(settings, _versions() | {"base fingerprint": cache.key(marks)})
    yield Progress("encode", path=run.path)
    with accelerator.main_process_first():
        moments = cache.cached(run.latents, lambda: _moments(pipe, clip))
        text = _text(pipe, settings.prompt)
        if not run.source.is_file():
            videos.write(clip, run.source)
    video = inflate(pipe.unet, settings.inflation, seed=settings.seed)
    tuning = Tuning(video, Levels.of(pipe.scheduler), moments, text, settings, accelerator)
    keeper = _Keeper(run, tuning, accelerator)
    if resume:
        keeper.resume()
    video = VideoUNet(accelerator.unwrap_model(tuning.video.unet), video.clip)
    yield from _tuned(keeper, _Studio(run, pipe, video, moments, clip, keep_inversions=False))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.free_memory()
    if not accelerator.is_main_process:
        return None
    Adapter.of(
        video.unet,
        tuning.learned(),
        inflation=settings.inflation,
        base=settings.base,
        fingerprint=marks,
        about={"prompt": settings.prompt, "steps": tuning.number} | _versions(),
    ).save(run.adapter)
    write_text(run.card, _card(settings, run))
    run.drop_checkpoints()
    yield Progress("tune", tuning.number, settings.max_train_steps, path=run.path)
    return run


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
    yield Progress("open", about=settings.run)
    studio = _reopened(settings)
    for prompt in settings.prompt:
        for seed in settings.seeds:
            video = yield from studio.edited(prompt, settings, seed)
            folder = _write_edit(studio, settings, prompt, seed, video)
            yield Progress("edit", path=folder, about=prompt)


def invert(settings: EditSettings) -> Job:
    """See `api.inverting`."""
    yield Progress("open", about=settings.run)
    studio = _reopened(settings)
    sampler = studio.sampler(settings)
    yield from studio.inverted(sampler, settings)
    yield Progress("invert", path=studio.inversion_file(sampler, settings))


def _edits(settings: TuneSettings, run: RunFolder, prompts: tuple[str, ...]) -> Job:
    """Edits of a run that is tuned, with its own settings."""
    if prompts:
        sampling = settings.model_dump(include=set(Sampling.model_fields))
        yield from edit(EditSettings(run=str(run.path), prompt=prompts, **sampling))


def _remaining_edits(settings: TuneSettings, run: RunFolder) -> Job:
    """What is left to do of a run that was stopped among its edits."""
    done = run.edited()
    left = tuple(prompt for prompt in settings.edit if prompt not in done)
    if not left:
        raise RunError(f"{run.path} is tuned to its end; edit it, or tune for more steps in a new run")
    yield Progress("tune", path=run.path)
    yield from _edits(settings, run, left)


@dataclasses.dataclass
class _Studio:
    """A tuned (or half-tuned) model with the clip it was tuned on: what it takes to make edits."""

    run: RunFolder
    pipe: StableDiffusionPipeline
    video: VideoUNet
    moments: dict[str, Tensor]
    source: Video
    keep_inversions: bool = True
    recent: dict[Path, Tensor] = dataclasses.field(default_factory=dict)

    def sampler(self, settings: Sampling) -> Sampler:
        return Levels.of(self.pipe.scheduler).sampler(
            settings.sampler,
            settings.num_inference_steps,
            spacing=settings.timestep_spacing,
            strength=settings.strength,
        )

    def edited(self, prompt: str, settings: Sampling, seed: int) -> Generator[Progress, None, Video]:
        """Invert, denoise towards the prompt, decode."""
        sampler = self.sampler(settings)
        start = yield from self.inverted(sampler, settings)
        generator = torch.Generator().manual_seed(seed)
        start = editing.mix_noise(start, self._clean(), sampler.start_alpha, settings.fresh_noise, generator)
        negative, text = models.embed(self.pipe, [settings.negative_prompt, prompt]).split(1)
        steps = editing.generate(
            self.video, sampler, start, text, negative, settings.guidance_scale,
            batch_guidance=settings.batch_guidance, generator=generator,
        )  # fmt: skip
        latents = start
        for step in steps:
            latents = step.latents
            yield Progress("edit", step.number, step.total, about=prompt)
        return self._timed(models.decode(self.pipe, latents, settings.fps or self.source.fps)[0])

    def _timed(self, edit: Video) -> Video:
        """An edit with the source's sound, if it plays as fast as the source."""
        same = math.isclose(edit.fps, self.source.fps, rel_tol=1e-4)
        return dataclasses.replace(edit, sound_SC=self.source.sound_SC if same else None)

    def inverted(self, sampler: Sampler, settings: Sampling) -> Generator[Progress, None, Tensor]:
        """The clip's noise at the level where the sampler starts; computed once and kept in the run folder."""
        levels = Levels.of(self.pipe.scheduler)
        timesteps = inversion.path_to(sampler, levels, settings.num_inv_steps, settings.timestep_spacing)
        file = self.inversion_file(sampler, settings)
        if file in self.recent:
            return self.recent[file]
        if self.keep_inversions and (kept := cache.read(file)):
            return kept["latents"].to(self._clean())
        latents, empty = self._clean(), models.embed(self.pipe, [""])
        for step in inversion.invert(self.video, levels, latents, empty, timesteps):
            latents = step.latents
            yield Progress("invert", step.number, step.total)
        if self.keep_inversions:
            cache.write(file, {"latents": latents})
        self.recent[file] = latents
        return latents

    def inversion_file(self, sampler: Sampler, settings: Sampling) -> Path:
        levels = Levels.of(self.pipe.scheduler)
        timesteps = inversion.path_to(sampler, levels, settings.num_inv_steps, settings.timestep_spacing)
        return self.run.inversion(cache.key(timesteps, self.moments["mean"], str(self.pipe.unet.dtype)))

    def _clean(self) -> Tensor:
        return self.moments["mean"].to(self.pipe._execution_device)


@dataclasses.dataclass
class _Keeper:
    """Writes what tuning leaves behind: logged steps and states to resume from."""

    run: RunFolder
    tuning: Tuning
    accelerator: Accelerator
    saved: int = -1

    def resume(self) -> None:
        """Go on from the newest readable state; from the start if there is none."""
        for path in reversed(self.run.checkpoints()):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError):
                continue
            self.tuning.load_state(state)
            self.saved = self.tuning.number
            break
        if self.accelerator.is_main_process:
            self.run.forget_steps_after(self.tuning.number)

    def log(self, step: Step) -> None:
        self.accelerator.log({"loss": step.loss, "learning_rate": step.learning_rate}, step=step.number)
        if self.accelerator.is_main_process:
            self.run.log_step(dataclasses.asdict(step))

    def checkpoint(self) -> None:
        if self.accelerator.is_main_process and self.saved != self.tuning.number:
            path = self.run.checkpoint(self.tuning.number)
            path.parent.mkdir(exist_ok=True)
            partial = path.with_name(f".{path.name}.part")
            torch.save(self.tuning.state(), partial)
            partial.replace(path)
            self.run.prune_checkpoints(self.tuning.settings.checkpoints_total_limit)
            self.saved = self.tuning.number


def _tuned(keeper: _Keeper, studio: _Studio) -> Job:
    """Tune to the end, with checkpoints and previews; a job closed early keeps its last step."""
    tuning, settings = keeper.tuning, keeper.tuning.settings
    if tuning.number == 0:
        yield from _previewed(keeper, studio)
    try:
        for step in tuning:
            keeper.log(step)
            if step.number % settings.checkpointing_steps == 0:
                keeper.checkpoint()
            yield Progress("tune", step.number, settings.max_train_steps, step)
            yield from _previewed(keeper, studio)
    except GeneratorExit:
        keeper.checkpoint()
        raise


def _previewed(keeper: _Keeper, studio: _Studio) -> Job:
    tuning, settings = keeper.tuning, keeper.tuning.settings
    due = settings.validation_steps and tuning.number % settings.validation_steps == 0
    studio.recent.clear()  # the weights have moved since
    for prompt in settings.edit if due and keeper.accelerator.is_main_process else ():
        for_preview = studio.edited(prompt, settings, settings.seeds[0])
        with tuning.averaged():
            video = yield from _relabelled(for_preview, "preview")
        path = keeper.run.sample(tuning.number, prompt)
        videos.write(side_by_side([studio.source, video], labels=[settings.prompt, prompt]), path)
        yield Progress("preview", path=path, about=prompt)


def _relabelled(work: Generator[Progress, None, Video], stage: str) -> Generator[Progress, None, Video]:
    while True:
        try:
            yield dataclasses.replace(next(work), stage=stage)
        except StopIteration as done:
            return done.value


def _accelerator(settings: TuneSettings) -> Accelerator:
    AcceleratorState._reset_state()  # accelerate keeps the precision of the process's first job otherwise
    options: dict[str, Any] = {"cpu": not torch.accelerator.is_available()}  # else processes do not meet on a CPU
    if settings.report_to:  # where to, _run_folder says when there is a folder
        options |= {"log_with": settings.report_to, "project_config": ProjectConfiguration(logging_dir="logs")}
        if not importlib.util.find_spec(settings.report_to):
            raise MissingExtra(f"report_to={settings.report_to}", settings.report_to)
    return Accelerator(mixed_precision=models.precision(settings.mixed_precision), **options)


def _clip(settings: TuneSettings, pipe: StableDiffusionPipeline) -> Video:
    """The frames to learn from, at a size the model takes."""

    def near(width: int, height: int) -> tuple[int, int]:
        side = settings.resolution or models.default_size(pipe)
        shape = (1, 1) if settings.fit == "stretch" else (width, height)
        return videos.area_size(*shape, area=side**2, multiple=models.stride(pipe) * 8)

    size = near
    if settings.width and settings.height:
        size = _taken(settings.width, settings.height, models.stride(pipe))
    clip = videos.read(
        settings.video, start=settings.start, stride=settings.stride, count=settings.num_frames,
        start_time=settings.start_time, sample_fps=settings.sample_fps, size=size, fit=settings.fit,
    )  # fmt: skip
    _refuse_fast_gif(settings, clip)
    return clip


def _used(run: RunFolder) -> Video | None:
    """The frames a run has used, if it has come so far that it will not need the clip again."""
    return videos.read(run.source) if run.source.is_file() and run.latents.is_file() else None


def _refuse_fast_gif(settings: Sampling, source: Video) -> None:
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


def _run_folder(
    settings: TuneSettings, accelerator: Accelerator, out: str | Path | None, resume: str | Path | None
) -> RunFolder:
    """One folder for all processes, made by the first."""
    made: list[Any] = [None]
    if accelerator.is_main_process:
        made = [RunFolder.open(resume) if resume else RunFolder.create(settings.video, out)]
    broadcast_object_list(made)
    run: RunFolder = made[0]
    if settings.report_to:
        options = settings.model_dump(mode="json")
        plain = {name: value for name, value in options.items() if isinstance(value, int | float | str | bool)}
        accelerator.project_configuration.logging_dir = str(run.logs)
        accelerator.init_trackers("tuneavideo", config=plain)
    return run


def _moments(pipe: StableDiffusionPipeline, clip: Video) -> dict[str, Tensor]:
    name = cache.key("moments", clip.frames_THWC, pipe.vae.config.scaling_factor, pipe.vae)
    return cache.cached(cache.folder() / f"{name}.safetensors", lambda: models.encode(pipe, clip))


def _text(pipe: StableDiffusionPipeline, prompt: str) -> Tensor:
    name = cache.key("text", pipe.tokenizer(prompt).input_ids, pipe.text_encoder)
    file = cache.folder() / f"{name}.safetensors"
    return cache.cached(file, lambda: {"text": models.embed(pipe, [prompt])})["text"]


def _reopened(settings: EditSettings) -> _Studio:
    """The model a run made, with the clip it was made on."""
    run = RunFolder.open(settings.run)
    own = run.read_settings()
    if not run.is_tuned:
        raise RunError(f"{run.path} is not tuned to its end; go on with: tuneavideo tune --resume {run.path}")
    dtype = models.PRECISIONS[models.precision(own.mixed_precision)]
    pipe = models.open(own.base, adapter=run.adapter, dtype=dtype)
    source = videos.read(run.source)
    _refuse_fast_gif(settings, source)
    moments = cache.cached(run.latents, lambda: models.encode(pipe, source))
    return _Studio(run, pipe, video_unet(pipe.unet), moments, source)


def _write_edit(studio: _Studio, settings: EditSettings, prompt: str, seed: int, video: Video) -> Path:
    folder = studio.run.new_edit(prompt)
    for kind in settings.formats:
        videos.write(video, folder / ("frames" if kind == "frames" else f"edit.{kind}"))
    source = dataclasses.replace(studio.source, fps=video.fps, sound_SC=video.sound_SC)
    labels = [studio.run.read_settings().prompt, prompt]
    videos.write(side_by_side([source, video], labels=labels), folder / "side-by-side.mp4")
    made = settings.model_dump(mode="json", exclude={"prompt", "seeds", "run"})
    write_text(folder / "edit.json", json.dumps({"prompt": prompt, "seed": seed} | made, indent=1))
    return folder


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
