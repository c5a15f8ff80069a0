"""Adoption job: a run folder from weights that another program tuned."""

from __future__ import annotations

import shutil
from pathlib import Path

from tuneavideo import video as videos
from tuneavideo.errors import CheckpointError
from tuneavideo.interop.convert import convert
from tuneavideo.interop.names import UNET, is_temporal
from tuneavideo.interop.reading import Checkpoint, read_checkpoint
from tuneavideo.interop.writing import tuned_layers
from tuneavideo.jobs import edit, plan, prepare
from tuneavideo.models import pipelines
from tuneavideo.models.adapter import Adapter, fingerprint
from tuneavideo.progress import Events, Progress
from tuneavideo.settings import EditSettings, Inflation, Sampling, TuneSettings
from tuneavideo.storage import cache
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import Span


def adopt(settings: TuneSettings, checkpoint: Path, *, out: str | Path | None = None, own_base: bool = False) -> Events:
    """Make a run of weights that another program tuned on a clip (arguments as in `Job.adopt`)."""
    found = read_checkpoint(checkpoint)
    layers = tuned_layers(found)
    if not any(map(is_temporal, layers)):
        raise CheckpointError(f"{checkpoint} has no temporal layers: it was not tuned on a clip")
    run = RunFolder.create(settings.video, out)
    converted = False
    with run.locked():
        try:
            yield Progress("open", path=run.path, about=settings.base)
            if own_base:
                convert(checkpoint, run.base, "diffusers")  # raises an error if the folder exists
                converted = True
                settings = settings.model_copy(update={"base": str(run.base.absolute())})
            if settings.stride is None and settings.sample_fps is None:  # as other programs do
                settings = settings.model_copy(update={"stride": 1})
            span = plan.choose_frames(settings)
            settings = settings.model_copy(update={"num_frames": span.count})
            run.write_settings(settings, {"adopted from": checkpoint})
            _fill(run, settings, span, found)
            run.keep()
        except Exception:
            if converted:
                shutil.rmtree(run.base, ignore_errors=True)
            run.discard()
            raise
    yield Progress("tune", path=run.path)
    if settings.edit:
        sampling = settings.model_dump(include=set(Sampling.model_fields))
        yield from edit.edit(EditSettings(run=str(run.path), prompt=settings.edit, **sampling))


def _fill(run: RunFolder, settings: TuneSettings, span: Span, found: Checkpoint) -> None:
    """Write the clip, its latents and last the adapter, with which the run counts as finished."""
    pipe = pipelines.load_image_pipeline(settings.base)
    clip = prepare.read_clip(settings, span, pipe, run.path)
    videos.write(clip, run.source)
    cache.write(run.latents, prepare.encode_clip(pipe, clip))
    inflation = found.adapter.get("inflation")
    adapter = Adapter(
        {name.removeprefix(UNET): tensor.read() for name, tensor in tuned_layers(found).items()},
        Inflation(**{**inflation, "references": tuple(inflation["references"])}) if inflation else Inflation(),
        settings.base,
        fingerprint(pipe.unet),
        {"prompt": settings.prompt, "adopted from": found.kind},
    )
    adapter.attach(pipe.unet)  # raises an error if it does not fit
    adapter.save(run.adapter, dtype=None)
