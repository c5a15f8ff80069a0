"""Edit job: edited clips from a run folder and prompts."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Sequence, Set
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from tuneavideo import video as videos
from tuneavideo.config import check_windows
from tuneavideo.jobs import plan
from tuneavideo.jobs.export import write_edit
from tuneavideo.jobs.prepare import (
    check_gif_rate,
    encode_clip,
    precision_of,
    restore_source,
    stored_clip,
    warn_of_truncation,
)
from tuneavideo.jobs.session import EditSession
from tuneavideo.method.inflate import inflate
from tuneavideo.models import addons, devices, pipelines
from tuneavideo.models.adapter import Adapter, assign
from tuneavideo.models.loading import Pipeline
from tuneavideo.progress import Events, Progress
from tuneavideo.settings import EditSettings
from tuneavideo.storage import cache
from tuneavideo.storage.run_files import EDIT, number_in
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.training import disk_space
from tuneavideo.training.checkpoints import read_weights
from tuneavideo.training.memory_plan import memory_advice
from tuneavideo.video.masks import Mask

PROCESS_TIMEOUT = timedelta(days=7)  # longer than any preview or inversion, which one process makes for all

logger = logging.getLogger(__name__)


def edit(settings: EditSettings, pipe: Pipeline | None = None) -> Events:
    """Make the edits of a clip, one per prompt and seed; those that a stopped request left are kept.

    Several processes of `accelerate launch` share the edits; the first one has the lock and the inversion.

    Args:
        settings: Settings of the edits.
        pipe: Base of a run without tuning, if it is loaded already.
    """
    run, processes = RunFolder.open(settings.run), _connected()
    is_first = processes.is_main_process
    with run.job(settings.step) if is_first else run.present(), memory_advice(run, settings):
        request = settings.model_dump(mode="json", exclude={"run"})
        done = run.edits_of(request)
        done = done if done < set(product(settings.prompt, settings.seeds)) else set()
        [done] = broadcast_object_list([done])
        yield from announce(settings)
        session = checked_session(settings, len(due_edits(settings, done)), pipe)
        if is_first:
            run.begin_edits(request)
        yield from with_few_threads(make_edits(settings, session, done, processes=processes), session)
        if is_first:
            run.end_edits()


def _connected() -> PartialState:
    """Connect the processes of `accelerate launch`, if there are several, and return their state."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return PartialState()
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PROCESS_TIMEOUT)


def checked_session(settings: EditSettings, count: int, pipe: Pipeline | None = None) -> EditSession:
    """Load the session of a run and check that the disk holds `count` edits.

    Args:
        settings: Settings of the edits.
        count: Number of edits to be made.
        pipe: Loaded base of the run, with its UNet as it was tuned; by default the base is loaded.

    Raises:
        TuneAVideoError: The run does not take these settings, or the disk is too small.
    """
    session = load_session(settings, pipe)
    kept = session.inversion_file(settings).is_file()
    disk_space.check_edits(session.run, settings, session.source, session.moments, count, kept=kept)
    return session


def with_few_threads(work: Generator[Progress, None, Any], session: EditSession) -> Events:
    """Yield the events of `work`, computed on one thread if the model is small."""
    yield from devices.single_threaded(work, session.pipe.unet, *session.moments["mean"].shape[2:])


def due_edits(settings: EditSettings, done: Set[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return prompt and seed of the edits that are not `done`."""
    return [each for each in product(settings.prompt, settings.seeds) if each not in done]


def make_edits(
    settings: EditSettings, session: EditSession, done: Set[tuple[str, int]] = frozenset(), is_planned: bool = False,
    processes: PartialState | None = None,
) -> Events:  # fmt: skip
    """Make the edits of every prompt and seed.

    Args:
        settings: Settings of the edits.
        session: Loaded session of the run.
        done: Prompt and seed of edits that exist already.
        is_planned: Whether the plan was shown before, as it is after tuning.
        processes: Processes that share the edits.
    """
    due = due_edits(settings, done)
    numbers: dict[tuple[str, int], int | None] = dict.fromkeys(due)
    several = processes if processes and processes.num_processes > 1 else None
    if several:
        [first] = broadcast_object_list([session.run.next_edit])
        numbers = {each: first + index for index, each in enumerate(due)}
        if several.is_main_process:
            yield from session.invert(settings)
        several.wait_for_everyone()
        due = due[several.process_index :: several.num_processes]
    if not is_planned:
        base, prompts = plan.base_of(settings), (*settings.prompt, settings.negative_prompt)
        warn_of_truncation(session.pipe, base, prompts)
        size = (session.source.width, session.source.height)
        for line in (
            plan.describe_edits(settings, session.source.frames, size),
            *plan.unknown_word_warnings(base, prompts),
        ):
            yield Progress("plan", about=line)
        yield Progress("plan", ahead=plan.steps_ahead(settings, len(due)))
    for batch in batched(due, settings.batch_prompts):
        clips = yield from session.edit(batch, settings)
        for (prompt, seed), video in zip(batch, clips, strict=True):
            folder = write_edit(session, settings, prompt, seed, video, numbers[prompt, seed])
            yield Progress("edit", path=folder, about=prompt)
    if several:
        several.wait_for_everyone()
        others = {number for each, number in numbers.items() if each not in due} if several.is_main_process else set()
        for folder in session.run.whole_edits():
            if number_in(folder, EDIT) in others:
                yield Progress("edit", path=folder, about=session.run.read_edit(folder)["prompt"])


def batched(requests: Sequence[tuple[str, int]], size: int) -> Iterator[Sequence[tuple[str, int]]]:
    """Split requests into batches of `size`; the last may be smaller."""
    return (requests[at : at + size] for at in range(0, len(requests), size))


def announce(settings: EditSettings) -> Events:
    """Yield the event before a base is loaded."""
    yield Progress("open", path=RunFolder.open(settings.run).path, about=plan.base_of(settings))


def load_session(settings: EditSettings, pipe: Pipeline | None = None) -> EditSession:
    """Load the model of a run and its clip; `pipe` is the pipeline if it is loaded already."""
    run = RunFolder.open(settings.run)
    own = run.read_settings()
    dtype = devices.PRECISIONS[precision_of(own)]
    is_loaded, pipe = (
        pipe is not None,
        pipe or pipelines.load_image_pipeline(settings.edit_model or own.base, dtype=dtype),
    )
    if not run.source.is_file():
        restore_source(run, own, pipe)
    kept = stored_clip(run)
    source, moments = kept or (videos.read_any(run.source, run.path), {})
    check_windows(settings, source.frames, controlnet=settings.controlnet is not None)
    extras = addons.load(pipe, settings, source)
    if run.is_untuned or settings.step is not None:
        video = inflate(pipe.unet, own.inflation, seed=own.seed)
        if settings.step is not None:
            video = assign(pipe.unet, read_weights(run, settings.step))
    else:
        adapter, any_base = Adapter.load(run.adapter), bool(settings.edit_model)
        video = adapter.assign(pipe.unet) if is_loaded else adapter.attach(pipe.unet, any_base=any_base).video
    check_gif_rate(settings, source)
    mask = Mask.read(Path(settings.mask), source, own.fit) if settings.mask else None
    if not moments:
        logger.warning("%s is missing or damaged; made again from %s", run.latents, run.source.name)
        moments = encode_clip(pipe, source)
        cache.write(run.latents, moments)
    if own.offload and not is_loaded:
        devices.offload(pipe)
    return EditSession(
        run, pipe, extras.with_controlnet(video), moments, source, addons=extras, mask=mask, step=settings.step
    )
