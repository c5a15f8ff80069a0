"""Tuning job: adapter, previews and edits from a clip and a base."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list

from tuneavideo import video as videos
from tuneavideo.errors import MissingExtra, RunError, TuneAVideoError
from tuneavideo.jobs import plan
from tuneavideo.jobs.edit import PROCESS_TIMEOUT, announce, checked_session, due_edits, make_edits, with_few_threads
from tuneavideo.jobs.export import model_card, versions
from tuneavideo.jobs.prepare import encode_clip, encode_text, precision_of, read_clip, stored_clip, warn_of_truncation
from tuneavideo.jobs.session import EditSession, Moments
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet, inflate
from tuneavideo.method.noise import NoiseSchedule
from tuneavideo.method.tuning import Tuning
from tuneavideo.models import codec, devices, pipelines
from tuneavideo.models.adapter import Adapter, fingerprint
from tuneavideo.models.loading import Pipeline
from tuneavideo.progress import Events, Progress, Step
from tuneavideo.settings import EditSettings, Sampling, TuneSettings
from tuneavideo.storage import atomic, cache
from tuneavideo.storage.run_files import UNTUNED
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.training.checkpoints import CheckpointManager
from tuneavideo.training.memory_plan import memory_advice, plan_memory
from tuneavideo.training.optimizers import make_optimizer
from tuneavideo.video import AnyVideo
from tuneavideo.video.montage import side_by_side


def tune(settings: TuneSettings, *, out: str | Path | None = None, resume: str | Path | None = None) -> Events:
    """Tune a base on a clip and make the edits that `settings` name (arguments as in `Job.tune`)."""
    done = _edits_done(settings, RunFolder.open(resume)) if resume else set()
    accelerator = make_accelerator(settings)
    with claim_run_folder(settings, accelerator, out, resume) as run, memory_advice(run):
        yield Progress("open", path=run.path, about=settings.base)
        pipe = None
        if not run.is_finished(settings):
            pipe = yield from train(settings, accelerator, run)
        if settings.edit and accelerator.is_main_process:
            yield from _edit(settings, run, done, pipe)


def train(settings: TuneSettings, accelerator: Accelerator, run: RunFolder) -> Generator[Progress, None, Pipeline]:
    """Train the adapter of a run and save it.

    Returns:
        The loaded base with the tuned UNet.
    """
    pipe = pipelines.load_image_pipeline(settings.base, dtype=devices.PRECISIONS[accelerator.mixed_precision])
    settings, clip, moments = yield from choose_clip(settings, pipe, run)
    settings = yield from choose_memory(settings, accelerator, pipe, clip)
    yield Progress("encode", path=run.path)
    moments, text = _encode(settings, accelerator, pipe, run, clip, moments)
    base_fingerprint = fingerprint(pipe.unet)
    video = inflate(pipe.unet, settings.inflation, seed=settings.seed)
    tuning = Tuning(video, NoiseSchedule.of(pipe.scheduler), moments, text, settings, accelerator, make_optimizer)
    manager = CheckpointManager(run, tuning, accelerator)
    if accelerator.is_main_process:
        manager.check_room(clip, moments)
        fill_run_folder(run, settings, base_fingerprint, clip, moments)
    manager.resume()
    yield Progress("plan", ahead=_ahead(settings, tuning.number))
    _start_trackers(settings, accelerator, run)
    # Previews and the adapter take the UNet without the wrapper for several processes.
    video = VideoUNet(accelerator.unwrap_model(tuning.video.unet), video.clip)
    session = EditSession(run, pipe, video, moments, clip, keep_inversions=False)
    yield from with_few_threads(_train(manager, session), session)
    _end_training(accelerator)
    if accelerator.is_main_process:
        _save_adapter(run, tuning, settings, video, base_fingerprint)
        yield Progress("tune", tuning.number, settings.max_train_steps, path=run.path)
    _prepare_for_inference(pipe, accelerator, tuning)
    return pipe


def _edit(settings: TuneSettings, run: RunFolder, done: set[tuple[str, int]], pipe: Pipeline | None) -> Events:
    """Make the edits of a tuned run that are not `done`, with the pipeline that was tuned if there is one."""
    gc.collect()  # accelerate's wrapper for half precision is part of a cycle
    sampling = run.read_settings().model_dump(include=set(Sampling.model_fields))
    edits = EditSettings(run=str(run.path), prompt=settings.edit, **sampling)
    if pipe is None:
        yield from announce(edits)
    session = checked_session(edits, len(due_edits(edits, done)), pipe)
    yield from with_few_threads(make_edits(edits, session, done, is_planned=pipe is not None), session)


def _edits_done(settings: TuneSettings, run: RunFolder) -> set[tuple[str, int]]:
    """Return the edits that a resumed run has. Raises RunError when it has all of them."""
    if not run.is_finished(settings):
        return set()
    done = run.edited()
    if done >= set(product(settings.edit, settings.seeds)):
        raise RunError(
            f"{run.path} is tuned to its end; edit it, or tune on with: tuneavideo tune --resume {run.quoted} "
            f"--max-train-steps {2 * settings.max_train_steps}"
        )
    return done


def choose_clip(
    settings: TuneSettings, pipe: Pipeline, run: RunFolder, *, is_tuned: bool = True
) -> Generator[Progress, None, tuple[TuneSettings, AnyVideo, Moments | None]]:
    """Read the frames of a run, from its folder if it has them.

    Args:
        settings: Settings of the run.
        pipe: Its base.
        run: Its folder.
        is_tuned: Whether a tuning follows, which the plan then describes.

    Returns:
        Settings with the frames that were taken, the clip, and its latents if the run folder has them.
    """
    prompts = (settings.prompt, *settings.edit)
    warn_of_truncation(pipe, settings.base, prompts)
    stored, lines = stored_clip(run), []
    if stored:
        clip, moments = stored
    else:
        moments, span = None, plan.choose_frames(settings)
        clip = read_clip(settings, span, pipe, run.path)
        size, has_size = (clip.width, clip.height), bool(settings.resolution or settings.width)
        lines = [
            plan.describe_tuning(settings, span, clip.frames, size, is_tuned=is_tuned),
            *plan.frame_warnings(span, clip.frames),
            *plan.size_warnings(settings.base, size, codec.default_size(pipe), is_set=has_size),
        ]
        settings = settings.model_copy(update={"stride": span.stride, "num_frames": clip.frames})
    for line in (*lines, *plan.unknown_word_warnings(settings.base, prompts)):
        yield Progress("plan", about=line)
    return settings, clip, moments


def choose_memory(
    settings: TuneSettings, accelerator: Accelerator, pipe: Pipeline, clip: AnyVideo
) -> Generator[Progress, None, TuneSettings]:
    """Choose settings that fit into memory, and offload the VAE and the text encoder if `offload` is set."""
    settings, line = plan_memory(settings, accelerator, pipe, clip)
    if line:
        yield Progress("memory", about=line)
    if settings.offload:
        devices.offload(pipe)
    return settings


def _encode(
    settings: TuneSettings, accelerator: Accelerator, pipe: Pipeline, run: RunFolder, clip: AnyVideo,
    moments: Moments | None,
) -> tuple[Moments, Conditions]:  # fmt: skip
    """Return the latents of the clip and the conditions of its caption; the first process computes them."""
    with accelerator.main_process_first():
        return moments or encode_clip(pipe, clip), encode_text(pipe, settings.prompt)


def fill_run_folder(
    run: RunFolder, settings: TuneSettings, base_fingerprint: dict[str, float], clip: AnyVideo, moments: Moments,
    **notes: str,
) -> None:  # fmt: skip
    """Write settings (with `notes` as comments), latents and clip, which resuming needs."""
    run.write_settings(settings, versions() | {"base fingerprint": cache.key(base_fingerprint)} | notes)
    if cache.read(run.latents) is None:
        cache.write(run.latents, moments)
    if not run.source.is_file():
        videos.write(clip, run.source)
    run.keep()


def _end_training(accelerator: Accelerator) -> None:
    accelerator.wait_for_everyone()
    accelerator.end_training()
    accelerator.free_memory()


def _save_adapter(
    run: RunFolder, tuning: Tuning, settings: TuneSettings, video: VideoUNet, base_fingerprint: dict[str, float]
) -> None:
    """Write the model card, then the adapter, with which the run counts as finished; delete what it replaces."""
    run.drop_inversions()
    atomic.write(run.card, model_card(settings, run))
    about = {"prompt": settings.prompt, "steps": tuning.number, "max_train_steps": settings.max_train_steps}
    Adapter.of(
        video.unet,
        tuning.learned(),
        inflation=settings.inflation,
        base=settings.base,
        fingerprint=base_fingerprint,
        about=about | versions(),
    ).save(run.adapter)
    run.drop_checkpoints()


def _prepare_for_inference(pipe: Pipeline, accelerator: Accelerator, tuning: Tuning) -> None:
    """Bring the tuned UNet into the state of a loaded one: its own precision, without gradients."""
    unet: Any = accelerator.unwrap_model(tuning.video.unet, keep_fp32_wrapper=False)
    unet.disable_gradient_checkpointing()
    if tuning.settings.lora_rank:
        unet.unload_lora()  # edits take the merged matrices of the adapter
    unet.zero_grad(set_to_none=True)
    pipe.unet = unet.requires_grad_(False).eval().to(devices.PRECISIONS[accelerator.mixed_precision])


def _ahead(settings: TuneSettings, number: int) -> dict[str, int]:
    """Steps of each stage after step `number` of tuning."""
    edits = plan.steps_ahead(settings, len(settings.edit) * len(settings.seeds))
    left = settings.max_train_steps - number
    previews = 1 + left // settings.validation_steps if settings.validation_steps else 0
    shown = settings.inversion_steps + len(settings.edit) * settings.num_inference_steps if settings.edit else 0
    return {"tune": left, "preview": previews * shown, **edits}


def _train(manager: CheckpointManager, session: EditSession) -> Events:
    """Tune to the end, with checkpoints and previews; a closed job saves a checkpoint of its last step."""
    settings = manager.tuning.settings
    try:
        yield from _previewed(manager, session)
        manager.accelerator.wait_for_everyone()
        for step in _steps(manager.tuning):
            manager.log(step)
            if step.number % settings.checkpointing_steps == 0:
                manager.checkpoint()
            yield Progress("tune", step.number, settings.max_train_steps, step)
            yield from _previewed(manager, session)
            if settings.validation_steps:  # only the first process makes previews
                manager.accelerator.wait_for_everyone()
    except GeneratorExit:
        manager.checkpoint()
        raise
    except RunError:
        manager.forget()
        raise


def _steps(tuning: Tuning) -> Iterator[Step]:
    """Yield the steps of a tuning with the memory that each took."""
    device, steps = tuning.accelerator.device, iter(tuning)
    while True:
        devices.reset_peak_memory(device)
        step = next(steps, None)
        if step is None:
            return
        recorder = tuning.recorder  # memory of a recorded step is allocated while it is recorded
        held = recorder.peak if recorder.recording else 0
        yield dataclasses.replace(step, memory=max(held, devices.used_memory(device)))


def _previewed(manager: CheckpointManager, session: EditSession) -> Events:
    """Make the previews that are due at this step and do not exist yet."""
    tuning, settings = manager.tuning, manager.tuning.settings
    due = settings.validation_steps and tuning.number % settings.validation_steps == 0
    session.recent.clear()  # of earlier weights
    if due and settings.keep_weights and tuning.number:
        manager.keep_weights()
    for index, prompt in enumerate(settings.edit if due and manager.accelerator.is_main_process else ()):
        path = manager.run.sample(tuning.number, index, prompt)
        if path.is_file():
            continue
        for_preview = session.edit([(prompt, settings.seeds[0])], settings)
        with tuning.averaged():
            [video] = yield from _relabelled(for_preview, "preview")
        videos.write(side_by_side([session.source, video], labels=[settings.prompt, prompt]), path)
        yield Progress("preview", path=path, about=prompt)


def _relabelled(
    work: Generator[Progress, None, list[AnyVideo]], stage: str
) -> Generator[Progress, None, list[AnyVideo]]:
    while True:
        try:
            yield dataclasses.replace(next(work), stage=stage)
        except StopIteration as done:
            return done.value


def make_accelerator(settings: TuneSettings) -> Accelerator:
    AcceleratorState._reset_state()  # otherwise accelerate keeps the precision of the process's first job
    options: dict[str, Any] = {
        "cpu": not torch.accelerator.is_available()
    }  # otherwise processes on CPUs do not connect
    options["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=PROCESS_TIMEOUT)]
    if settings.report_to:  # _start_trackers names the folder later
        options |= {"log_with": settings.report_to, "project_config": ProjectConfiguration(logging_dir="logs")}
        if not importlib.util.find_spec(settings.report_to):
            raise MissingExtra(f"report_to={settings.report_to}", settings.report_to)
    return Accelerator(mixed_precision=precision_of(settings), **options)


@contextmanager
def claim_run_folder(
    settings: TuneSettings, accelerator: Accelerator, out: str | Path | None, resume: str | Path | None
) -> Generator[RunFolder, None, None]:
    """Create or open the run folder in the first process, which locks it, and yield it in all.

    A mistake before tuning begins removes a new folder. A later error is written to `error.txt`, with how to resume.
    """
    made: list[Any] = [None]  # broadcast from the first process to the others
    with ExitStack() as stack:
        if accelerator.is_main_process:
            made = [RunFolder.open(resume) if resume else RunFolder.create(settings.video, out)]
            stack.enter_context(made[0].locked())
        broadcast_object_list(made)
        run: RunFolder = made[0]
        try:
            if accelerator.is_main_process:
                run.write_settings(settings, versions() | (UNTUNED if run.is_untuned else {}))
            with run.present():
                yield run
        except Exception as error:
            if run.is_new and not resume:
                if accelerator.is_main_process:
                    run.discard()
            elif run.settings.is_file():
                if not run.is_new:
                    error.add_note(_how_to_resume(run, error))
                run.write_error(error)
            raise
        if accelerator.is_main_process:
            run.error.unlink(missing_ok=True)


def _how_to_resume(run: RunFolder, error: Exception) -> str:
    flags = error.resume_flags if isinstance(error, TuneAVideoError) else ""
    if flags is None:
        return f"{run.path} cannot be resumed with these settings"
    return f"go on with: {f'tuneavideo tune --resume {run.quoted} {flags}'.rstrip()}"


def _start_trackers(settings: TuneSettings, accelerator: Accelerator, run: RunFolder) -> None:
    if settings.report_to:
        options = settings.model_dump(mode="json")
        plain = {name: value for name, value in options.items() if isinstance(value, int | float | str | bool)}
        accelerator.project_configuration.logging_dir = str(run.logs)
        accelerator.init_trackers("tuneavideo", config=plain)
