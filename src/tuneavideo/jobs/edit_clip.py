"""Edits of a clip without tuning, in a run folder that can be tuned afterwards."""

from __future__ import annotations

import logging
from pathlib import Path

from tuneavideo.errors import MemoryShort
from tuneavideo.jobs.edit import edit
from tuneavideo.jobs.prepare import encode_clip
from tuneavideo.jobs.tune import choose_clip, choose_memory, claim_run_folder, fill_run_folder, make_accelerator
from tuneavideo.models import devices, pipelines
from tuneavideo.models.adapter import fingerprint
from tuneavideo.progress import Events, Progress
from tuneavideo.settings import EditSettings, Sampling, TuneSettings
from tuneavideo.storage.run_files import UNTUNED
from tuneavideo.training.memory_plan import memory_advice

logger = logging.getLogger(__name__)


def edit_clip(settings: TuneSettings, edits: EditSettings, *, out: str | Path | None = None) -> Events:
    """Make a run folder of a clip and edit it without tuning; the last event has the command that tunes it."""
    accelerator = make_accelerator(settings)
    with claim_run_folder(settings, accelerator, out, None) as run, memory_advice(run, edits):
        yield Progress("open", path=run.path, about=settings.base)
        pipe = pipelines.load_image_pipeline(settings.base, dtype=devices.PRECISIONS[accelerator.mixed_precision])
        base_fingerprint, of_clip = fingerprint(pipe.unet), settings.model_copy(update={"edit": ()})
        of_clip, clip, _ = yield from choose_clip(of_clip, pipe, run, is_tuned=False)
        settings = of_clip.model_copy(update={"edit": settings.edit})
        try:  # tuning has the settings that fit it from now on, as if it had begun
            settings = yield from choose_memory(settings, accelerator, pipe, clip)
        except MemoryShort as error:
            logger.warning("this clip can be edited but not tuned here: %s", error)
        yield Progress("encode", path=run.path)
        fill_run_folder(run, settings, base_fingerprint, clip, encode_clip(pipe, clip), **UNTUNED)
    sampling = settings.model_dump(include=set(Sampling.model_fields))
    edits = edits.model_copy(update={"run": str(run.path), **sampling})
    yield from edit(edits, None if edits.edit_model else pipe)
    yield Progress("plan", about=f"edited without tuning; tune it with: tuneavideo tune --resume {run.quoted}")
