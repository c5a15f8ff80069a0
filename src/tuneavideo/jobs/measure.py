"""Measurement of a tuning before it starts: a few of its steps, in a folder that is removed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from tuneavideo import video as videos
from tuneavideo.jobs.tune import claim_run_folder, make_accelerator, train
from tuneavideo.progress import Events, Progress
from tuneavideo.settings import TuneSettings
from tuneavideo.training.memory_plan import bytes_for_more

STEPS = 3  # the first one includes preparations


def measure(settings: TuneSettings, place: Path) -> Events:
    """Measure a few steps of a tuning.

    The last event has the `scores` `pixels` of the clip (frames x width x height), `seconds` of a step, `memory` in
    bytes, and `more`, the bytes that each further pixel needs (estimated).

    Args:
        settings: Settings of the tuning.
        place: Existing folder, in which the run folder is made and removed.
    """
    brief = {"max_train_steps": STEPS, "edit": (), "validation_steps": None, "report_to": None, "keep_weights": False}
    own = settings.model_copy(update=brief)
    accelerator, last = make_accelerator(own), None
    with (
        TemporaryDirectory(prefix="measured-", dir=place) as folder,
        claim_run_folder(own, accelerator, Path(folder) / "run", None) as run,
    ):
        work = train(own, accelerator, run)
        while True:
            try:
                each = next(work)
            except StopIteration as done:
                pipe = done.value
                break
            last = each.step or last
            yield each
        assert last, "it has steps"
        clip = videos.read_any(run.source, run.path)
        more = bytes_for_more(run.read_settings(), accelerator, pipe, clip)
    pixels = clip.frames * clip.width * clip.height
    found = {"pixels": pixels, "seconds": last.seconds, "memory": last.memory, "more": more}
    yield Progress("measure", scores=found)
