"""Time and memory of a tuning, estimated before it starts.

What earlier runs on this machine measured is taken if there are any, otherwise a measurement of a few steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from tuneavideo import api
from tuneavideo.bases import BASES
from tuneavideo.jobs.plan import default_frames, steps_ahead
from tuneavideo.progress import WORK
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.web.runs import Runs, last_step, settings_of

RECENT = 20  # runs that are looked at


def described(runs: Runs, settings: TuneSettings) -> dict[str, Any]:
    """Return the `estimate` of a tuning in a sentence, and whether a measurement would improve it (`measure`)."""
    from tuneavideo.reporting.formatting import duration  # slow to import: the first page goes before

    base, pixels = BASES.get(settings.base), _pixels(settings)
    known, found = [*_of_runs(runs, settings.base)], measurements(runs.root).get(settings.base)
    if known:
        seconds = median(pace for pace, _ in known) * pixels
        memory, source = max(memory for _, memory in known), "as earlier runs on this base needed"
    elif found:
        seconds, source = found["seconds"] * pixels / found["pixels"], "measured here in a few steps"
        memory = max(0.0, found["memory"] + found["more"] * (pixels - found["pixels"]))
    else:
        least = f" It needs at least {base.memory_gb:g} GB of GPU memory." if base and base.memory_gb else ""
        return {"measure": True, "estimate": f"Time and memory on this computer are not known yet.{least}"}
    total = settings.max_train_steps * seconds + _edit_steps(settings) * seconds / WORK["tune"]
    text = (
        f"About {duration(float(f'{total:.2g}'))} in all, {duration(float(f'{seconds:.2g}'))} a step, and "
        f"{atomic.size(memory)} of memory, {source}."
    )
    return {"measure": False, "estimate": text}


def is_here(base: str) -> bool:
    """Return whether the weights of a base are on this computer."""
    known = {row["name"]: row["here"] for row in api.models()}
    return known.get(base, Path(base).exists())


def measurements(root: Path) -> dict[str, dict[str, float]]:
    """Return what was measured in a root folder, by base (see `jobs.measure`)."""
    try:
        return json.loads((root / ".web" / "measured.json").read_bytes())
    except (OSError, ValueError):
        return {}


def note(root: Path, base: str, found: dict[str, float]) -> None:
    """Record a measurement."""
    atomic.write(root / ".web" / "measured.json", json.dumps(measurements(root) | {base: found}))


def _of_runs(runs: Runs, base: str) -> Iterator[tuple[float, int]]:
    """Yield the seconds of a step per frame and pixel, and the bytes of memory, of earlier runs on a base."""
    for listed in runs.listed()[:RECENT]:
        run = runs.open(listed.name)
        step = last_step(run)
        if listed.base == base and step and step["number"] > 1:
            own = settings_of(run.settings, run.settings.stat().st_mtime_ns)
            yield step["seconds"] / _pixels(own), step["memory"]


def _edit_steps(settings: TuneSettings) -> float:
    """Return the steps of inversion, edits and previews, weighted by their work."""
    ahead = steps_ahead(settings, len(settings.edit) * len(settings.seeds))
    work = sum(WORK[stage] * steps for stage, steps in ahead.items())
    previews = 1 + settings.max_train_steps // settings.validation_steps if settings.validation_steps else 0
    shown = steps_ahead(settings, len(settings.edit))
    return work + previews * sum(WORK[stage] * steps for stage, steps in shown.items())


def _pixels(settings: TuneSettings) -> float:
    """Return frames times pixels of a tuning."""
    frames = settings.num_frames if isinstance(settings.num_frames, int) else default_frames(settings.base)
    base = BASES.get(settings.base)
    side = settings.resolution or (base.settings["resolution"] if base else 512)
    area = settings.width * settings.height if settings.width and settings.height else side**2
    return float(frames * area)
