"""The jobs behind the API, as generators: run folder and models in, files of the run out."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import logging
from collections.abc import Generator, Iterable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list

from tuneavideo import cache, disk, files, models, plan, streaming
from tuneavideo import style as styles
from tuneavideo import video as videos
from tuneavideo.adapter import Adapter, fingerprint
from tuneavideo.conditions import Conditions
from tuneavideo.errors import MissingExtra, RunError, SettingsError, TuneAVideoError, VideoError
from tuneavideo.fitting import fitted, memory_told, threaded
from tuneavideo.inflate import VideoUNet, inflate
from tuneavideo.keeping import Keeper
from tuneavideo.montage import contact_sheet, side_by_side
from tuneavideo.noise import Levels
from tuneavideo.opening import Pipeline
from tuneavideo.progress import Job, Progress
from tuneavideo.runs import RunFolder
from tuneavideo.settings import EditSettings, Sampling, TuneSettings, check_windows
from tuneavideo.studio import Footage, Moments, Studio
from tuneavideo.tuning import Tuning
from tuneavideo.version import __version__
from tuneavideo.video import Span, Spool, Video

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "av")

# How long processes wait for one of them: longer than any preview of a long clip.
PATIENCE = timedelta(days=7)

logger = logging.getLogger(__name__)


def tune(settings: TuneSettings, *, out: str | Path | None = None, resume: str | Path | None = None) -> Job:
    """See `api.tuning`."""
    done = _edits_done(settings, RunFolder.open(resume)) if resume else set()
    accelerator = _accelerator(settings)
    with _claimed(settings, accelerator, out, resume) as run, memory_told(run):
        yield Progress("open", path=run.path, about=settings.base)
        is_told = not run.is_finished(settings)
        if is_told:
            yield from _learned(settings, accelerator, run)
        gc.collect()  # accelerate's wrapper for half precision is part of a cycle
        if settings.edit and accelerator.is_main_process:
            sampling = run.read_settings().model_dump(include=set(Sampling.model_fields))
            edits = EditSettings(run=str(run.path), prompt=settings.edit, **sampling)
            yield from _opening(edits)
            studio = _checked(edits, len(_due(edits, done)))
            yield from _with_few_threads(_edited(edits, studio, done, is_told), studio)


def _edits_done(settings: TuneSettings, run: RunFolder) -> set[tuple[str, int]]:
    """Edits that a run has which is resumed; refuses one that has them all."""
    if not run.is_finished(settings):
        return set()
    done = run.edited()
    if done >= set(product(settings.edit, settings.seeds)):
        raise RunError(
            f"{run.path} is tuned to its end; edit it, or tune on with: tuneavideo tune --resume {run.quoted} "
            f"--max-train-steps {2 * settings.max_train_steps}"
        )
    return done


def _learned(settings: TuneSettings, accelerator: Accelerator, run: RunFolder) -> Job:
    """Tune and save."""
    pipe = models.open_image_model(settings.base, dtype=models.PRECISIONS[accelerator.mixed_precision])
    prompts = (settings.prompt, *settings.edit)
    _warn_of_cuts(pipe, settings.base, prompts)
    kept = _kept(run)
    if kept:
        clip, moments = kept
    else:
        moments, span = None, plan.frames(settings)
        clip = clip_of(settings, span, pipe, run.path)
        size = (clip.width, clip.height)
        yield Progress("plan", about=plan.tuning(settings, span, clip.frames, size))
        settings = settings.model_copy(update={"stride": span.stride, "num_frames": clip.frames})
        asked = bool(settings.resolution or settings.width)
        for line in (
            *plan.frame_warnings(span, clip.frames),
            *plan.size_warnings(settings.base, size, models.default_size(pipe), asked=asked),
        ):
            yield Progress("plan", about=line)
    for line in plan.word_warnings(settings.base, prompts):
        yield Progress("plan", about=line)
    marks = fingerprint(pipe.unet)
    settings, line = fitted(settings, accelerator, pipe, clip)
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
        keeper.check_room(clip, moments)
        run.write_settings(settings, _versions() | {"base fingerprint": cache.key(marks)})
        if not kept and isinstance(clip, Video):
            cache.write(run.latents, moments)
        if not run.source.is_file():
            videos.write(clip, run.source)
        run.keep()
    keeper.resume()
    yield Progress("plan", ahead=_ahead(settings, tuning.number))
    _report_to(settings, accelerator, run)
    video = VideoUNet(accelerator.unwrap_model(tuning.video.unet), video.clip)
    studio = Studio(run, pipe, video, moments, clip, keep_inversions=False)
    yield from _with_few_threads(_tuned(keeper, studio), studio)
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
            about={"prompt": settings.prompt, "steps": tuning.number, "max_train_steps": settings.max_train_steps}
            | _versions(),
        ).save(run.adapter)
        run.drop_checkpoints()
        yield Progress("tune", tuning.number, settings.max_train_steps, path=run.path)


def _ahead(settings: TuneSettings, number: int) -> dict[str, int]:
    """Steps of each stage after step `number` of tuning."""
    edits = plan.steps_ahead(settings, len(settings.edit) * len(settings.seeds))
    left = settings.max_train_steps - number
    previews = 1 + left // settings.validation_steps if settings.validation_steps else 0
    shown = settings.inversion_steps + len(settings.edit) * settings.num_inference_steps if settings.edit else 0
    return {"tune": left, "preview": previews * shown, **edits}


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
    with run.locked(), run.present(), memory_told(run, settings):
        asked = settings.model_dump(mode="json", exclude={"run"})
        done = run.made_of(asked)
        done = done if done < set(product(settings.prompt, settings.seeds)) else set()
        yield from _opening(settings)
        studio = _checked(settings, len(_due(settings, done)))
        run.begin_edits(asked)
        yield from _with_few_threads(_edited(settings, studio, done), studio)
        run.end_edits()


def _checked(settings: EditSettings, count: int) -> Studio:
    """The model of a run, once it is known to take these settings, and the disk to hold `count` edits."""
    studio = _reopened(settings)
    kept = studio.inversion_file(settings).is_file()
    disk.check_edits(studio.run, settings, studio.source, studio.moments, count, kept=kept)
    return studio


def _with_few_threads(work: Generator[Progress, None, Any], studio: Studio) -> Job:
    """Steps of `work`, on one thread if the model is small for the clip."""
    yield from threaded(work, studio.pipe.unet, *studio.moments["mean"].shape[2:])


def _due(settings: EditSettings, done: Set[tuple[str, int]]) -> list[tuple[str, int]]:
    return [each for each in product(settings.prompt, settings.seeds) if each not in done]


def _edited(
    settings: EditSettings, studio: Studio, done: Set[tuple[str, int]] = frozenset(), is_told: bool = False
) -> Job:
    """Edits with every prompt and seed but those that are `done`; the plan `is_told` if they come after tuning."""
    due = _due(settings, done)
    if not is_told:
        base, prompts = _base_of(settings), (*settings.prompt, settings.negative_prompt)
        _warn_of_cuts(studio.pipe, base, prompts)
        for line in (plan.editing(settings, studio.source.frames, (studio.source.width, studio.source.height)),
                     *plan.word_warnings(base, prompts)):  # fmt: skip
            yield Progress("plan", about=line)
        yield Progress("plan", ahead=plan.steps_ahead(settings, len(due)))
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
    settings = settings.model_copy(update={"feature_reuse": 1})  # an inversion computes every step in full
    with run.locked(), run.present(), memory_told(run, settings):
        yield from _opening(settings)
        studio = _checked(settings, 0)
        yield from _with_few_threads(studio.inverted(settings), studio)
        yield Progress("invert", path=studio.inversion_file(settings))


def _opening(settings: EditSettings) -> Job:
    yield Progress("open", path=RunFolder.open(settings.run).path, about=_base_of(settings))


def _base_of(settings: EditSettings) -> str:
    return settings.edit_model or RunFolder.open(settings.run).read_settings().base


def _tuned(keeper: Keeper, studio: Studio) -> Job:
    """Tune to the end, with checkpoints and previews; a job that is closed early keeps its last step."""
    settings = keeper.tuning.settings
    try:
        yield from _previewed(keeper, studio)
        keeper.accelerator.wait_for_everyone()
        for step in keeper.tuning:
            keeper.log(step)
            if step.number % settings.checkpointing_steps == 0:
                keeper.checkpoint()
            yield Progress("tune", step.number, settings.max_train_steps, step)
            yield from _previewed(keeper, studio)
            if settings.validation_steps:  # only the first process makes previews
                keeper.accelerator.wait_for_everyone()
    except GeneratorExit:
        keeper.checkpoint()
        raise
    except RunError:
        keeper.forget()
        raise


def _previewed(keeper: Keeper, studio: Studio) -> Job:
    """The previews that are due at this step and not there yet."""
    tuning, settings = keeper.tuning, keeper.tuning.settings
    due = settings.validation_steps and tuning.number % settings.validation_steps == 0
    studio.recent.clear()  # the weights have moved since
    for index, prompt in enumerate(settings.edit if due and keeper.accelerator.is_main_process else ()):
        path = keeper.run.sample(tuning.number, index, prompt)
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
    options["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=PATIENCE)]
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


def clip_of(settings: TuneSettings, span: Span, pipe: Pipeline, folder: Path) -> Footage:
    """The frames of a `span` to learn from, at a size the model takes; a long clip lies in a file in `folder`."""

    def near(width: int, height: int) -> tuple[int, int]:
        side = settings.resolution or models.default_size(pipe)
        shape = (1, 1) if settings.fit == "stretch" else (width, height)
        return videos.area_size(*shape, area=side**2, multiple=models.stride(pipe) * 8)

    size = near
    if settings.width and settings.height:
        size = _taken(settings.width, settings.height, models.stride(pipe))
    clip = videos.footage(
        settings.video, folder, start=settings.start, stride=span.stride or 1, count=span.count,
        start_time=settings.start_time, sample_fps=settings.sample_fps, size=size, fit=settings.fit,
        fewer=settings.num_frames is None,
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
            with run.present():
                yield run
        except Exception as error:
            if run.is_new:
                if accelerator.is_main_process and not resume:
                    run.discard()
            elif run.settings.is_file():
                error.add_note(_how_to_resume(run, error))
            raise


def _how_to_resume(run: RunFolder, error: Exception) -> str:
    flags = error.resume_flags if isinstance(error, TuneAVideoError) else ""
    if flags is None:
        return f"{run.path} cannot be resumed so"
    return f"go on with: {f'tuneavideo tune --resume {run.quoted} {flags}'.rstrip()}"


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


def _reopened(settings: EditSettings) -> Studio:
    """The model a run made, with the clip it was made on."""
    run = RunFolder.open(settings.run)
    own = run.read_settings()
    run.require_tuned()
    dtype = models.PRECISIONS[_precision(own)]
    pipe = models.open_image_model(settings.edit_model or own.base, dtype=dtype)
    if not run.source.is_file():
        _make_source(run, own, pipe)
    kept = _kept(run)
    source, moments = kept or (videos.footage(run.source, run.path), {})
    on_disk, controlled = isinstance(source, Spool), settings.controlnet is not None
    check_windows(settings, source.frames, on_disk=on_disk, controlnet=controlled)
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
    return Studio(run, pipe, style.controlled(video), moments, source, style=style)


def _make_source(run: RunFolder, own: TuneSettings, pipe: Pipeline) -> None:
    """Write a lost `source.mp4` again from the clip that the run was tuned on."""
    if not Path(own.video).exists():
        raise VideoError(
            f"{run.source} is missing, and so is {own.video}, which it was made from; put one of them back"
        )
    logger.warning("%s is missing; made again from %s", run.source, own.video)
    videos.write(clip_of(own, plan.frames(own), pipe, run.path), run.source)


def _write_edit(studio: Studio, settings: EditSettings, prompt: str, seed: int, video: Footage) -> Path:
    with studio.run.new_edit(prompt) as (draft, folder):
        for kind in settings.formats:
            videos.write(video, draft / ("frames" if kind == "frames" else f"edit.{kind}"))
        source = dataclasses.replace(studio.source, fps=video.fps, sound_SC=video.sound_SC)
        labels = [studio.run.read_settings().prompt, prompt]
        videos.write(side_by_side([source, video], labels=labels), draft / "side-by-side.mp4")
        made = settings.model_dump(mode="json", exclude={"prompt", "seeds", "run"})
        told = {"tuned_steps": studio.run.about.get("steps")}
        files.write(draft / "edit.json", json.dumps({"prompt": prompt, "seed": seed} | made | told, indent=1))
    return folder


def _warn_of_cuts(pipe: Pipeline, base: str, prompts: Iterable[str]) -> None:
    most = pipe.tokenizer.model_max_length - 2  # without the two that mark its ends
    for prompt in dict.fromkeys(prompts):
        if cut := models.cut(pipe, prompt):
            logger.warning(
                "the prompt %r is longer than the %d tokens that the text encoder of %s takes; left out: %r",
                prompt, most, base, cut,
            )  # fmt: skip


def _versions() -> dict[str, str]:
    return {"tuneavideo": __version__} | {package: version(package) for package in PACKAGES}


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
