"""Time and memory of a tuning, estimated before it starts from what earlier runs on this machine measured."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from tuneavideo.bases import BASES
from tuneavideo.jobs.plan import default_frames, steps_ahead
from tuneavideo.progress import WORK
from tuneavideo.reporting.formatting import duration
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.web.runs import Runs, last_step, settings_of

RECENT = 20  # runs that are looked at


def measured(runs: Runs, base: str) -> Iterator[tuple[float, int]]:
    """Yield the seconds of a step per frame and pixel, and the bytes of memory, of earlier runs on a base."""
    for listed in runs.listed()[:RECENT]:
        run = runs.open(listed.name)
        step = last_step(run)
        if listed.base == base and step and step["number"] > 1:
            own = settings_of(run.settings, run.settings.stat().st_mtime_ns)
            yield step["seconds"] / _work(own), step["memory"]


def described(runs: Runs, settings: TuneSettings) -> str:
    """Return the estimated time and memory of a tuning in a sentence."""
    known = [*measured(runs, settings.base)]
    base = BASES.get(settings.base)
    if not known:
        least = f" It needs at least {base.memory_gb:g} GB of GPU memory." if base and base.memory_gb else ""
        return f"No earlier run on {settings.base} has measured the time here; the first one does.{least}"
    seconds = median(pace for pace, _ in known) * _work(settings)
    total = settings.max_train_steps * seconds + _edit_steps(settings) * seconds / WORK["tune"]
    memory = max(memory for _, memory in known)
    return (
        f"About {duration(float(f'{total:.2g}'))} in all, {duration(float(f'{seconds:.2g}'))} a step. Earlier runs on "
        f"{settings.base} needed up to {atomic.size(memory)} of memory here."
    )


def _edit_steps(settings: TuneSettings) -> float:
    """Return the steps of inversion and edits, weighted by their work."""
    ahead = steps_ahead(settings, len(settings.edit) * len(settings.seeds))
    return sum(WORK[stage] * steps for stage, steps in ahead.items())


def _work(settings: TuneSettings) -> float:
    """Return frames times pixels of a tuning."""
    frames = settings.num_frames if isinstance(settings.num_frames, int) else default_frames(settings.base)
    base = BASES.get(settings.base)
    side = settings.resolution or (base.settings["resolution"] if base else 512)
    area = settings.width * settings.height if settings.width and settings.height else side**2
    return float(frames * area)
