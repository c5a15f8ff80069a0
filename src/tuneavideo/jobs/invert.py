"""Inversion job: latents of a clip at every timestep, kept in the run folder."""

from __future__ import annotations

from tuneavideo.jobs.edit import announce, checked_session, with_few_threads
from tuneavideo.progress import Events, Progress
from tuneavideo.settings import EditSettings
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.training.memory_plan import memory_advice


def invert(settings: EditSettings) -> Events:
    """Invert a tuned clip to the timestep that its edits start from."""
    run = RunFolder.open(settings.run)
    settings = settings.model_copy(update={"feature_reuse": 1})  # an inversion computes every step in full
    with run.job(), memory_advice(run, settings):
        yield from announce(settings)
        session = checked_session(settings, 0)
        yield from with_few_threads(session.invert(settings), session)
        yield Progress("invert", path=session.inversion_file(settings))
