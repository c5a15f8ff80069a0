"""Hours and disk space of jobs, estimated from runs on this machine or from published figures. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tuneavideo.bases import BASES
from tuneavideo.batch.job_file import BatchJob
from tuneavideo.config import parse_yaml
from tuneavideo.errors import SettingsError
from tuneavideo.jobs.plan import default_frames, steps_ahead, visible_devices
from tuneavideo.progress import WORK
from tuneavideo.settings import TuneSettings
from tuneavideo.storage.run_files import RunFiles

RECENT = 20  # runs that are looked at
# Seconds of a tuning step per frame and pixel: 8 frames of 64 x 64 on two CPU cores, 12 frames of 512 x 512 on an H200
# (docs/performance.md). They are used where no run has measured the time.
MINIATURE, GPU = 0.0827 / (8 * 64**2), 0.0884 / (12 * 512**2)
# Megabytes of an adapter in half precision, and of its training in full precision, by the base's architecture.
ADAPTERS = {"sd1": 149.0, "sd2": 148.0, "sdxl": 520.0, "": 1.5}
CHECKPOINT = 6.0  # times the adapter: values and two moments in full precision
VIDEO = 0.25  # bytes of a video per byte of its frames, at most
START = 2.0  # seconds of a job beside its steps: encoding, checkpoints, the adapter


@dataclass(frozen=True)
class Estimate:
    """Estimate of one job.

    Attributes:
        seconds: Time on one device.
        bytes: Disk space that its run folder keeps.
        passing: Further disk space while it is tuned.
    """

    seconds: float
    bytes: float
    passing: float


@dataclass(frozen=True)
class Speed:
    """Seconds of a tuning step per frame and pixel, and where they were measured."""

    seconds: float
    source: str


def speed_of(base: str, places: Iterable[Path]) -> Speed:
    """Return the speed of a base, from runs in some folders, or a published one."""
    paces = [pace for place in places for pace in _measured(base, place)]
    if paces:
        return Speed(median(paces), f"{len(paces)} earlier run{'s' * (len(paces) != 1)} on {base}")
    if base == "miniature":
        return Speed(MINIATURE, "two CPU cores of docs/performance.md, since no run on miniature is there")
    return Speed(GPU, f"an H200 with SD 1.5 (docs/performance.md), since no run on {base} is there")


def estimate(job: BatchJob, speed: Speed) -> Estimate:
    """Estimate a job that is run from its beginning."""
    own, edits = job.settings, len(job.edits) * len(job.settings.seeds)
    frames, pixels = frames_and_pixels(own)
    ahead = {"tune": own.max_train_steps * own.gradient_accumulation_steps * own.train_batch_size}
    ahead |= steps_ahead(own, edits)
    step = speed.seconds * frames * pixels
    seconds = START + sum(step * WORK[stage] / WORK["tune"] * steps for stage, steps in ahead.items())
    latents, raw = 4 * 4 * frames * pixels / 64, 3 * frames * pixels
    adapter = 1e6 * adapter_megabytes(own)
    kept = adapter + 2 * latents + VIDEO * raw * (1 + 3 * edits * ("mp4" in own.formats))
    kept += raw * edits * ("frames" in own.formats) + (edits > 0) * latents * (own.inversion_steps + 1)
    return Estimate(seconds, kept, CHECKPOINT * adapter * (1 + own.checkpoints_total_limit))


def adapter_megabytes(settings: TuneSettings) -> float:
    """Return the size of an adapter, in MB; of an unknown base that of SD 1.5."""
    base = BASES.get(settings.base)
    whole = ADAPTERS[base.family if base else "sd1"]
    return min(whole, whole * settings.lora_rank / 500) if settings.lora_rank else whole


def frames_and_pixels(settings: TuneSettings) -> tuple[int, int]:
    """Return the number of frames of a tuning, and the pixels of a frame."""
    frames = settings.num_frames if isinstance(settings.num_frames, int) else default_frames(settings.base)
    if settings.width and settings.height:
        return frames, settings.width * settings.height
    base = BASES.get(settings.base)
    side = settings.resolution or (base.settings["resolution"] if base else 512)
    return frames, side**2


def summary(jobs: Sequence[BatchJob], places: Sequence[Path], workers: int | None = None) -> tuple[Estimate, list[str]]:
    """Return the estimate of all jobs together, and lines that describe it."""
    speeds = {base: speed_of(base, places) for base in {job.settings.base for job in jobs}}
    each = [estimate(job, speeds[job.settings.base]) for job in jobs]
    workers = workers or len(visible_devices())
    seconds, kept = sum(one.seconds for one in each), sum(one.bytes for one in each)
    passing = sum(sorted((one.passing for one in each), reverse=True)[:workers])
    hours, busy = seconds / 3600, min(workers, len(jobs)) or 1
    lines = [
        f"time: {_hours(hours / busy)} on {busy} worker{'s' * (busy != 1)}, {_hours(hours)} of device time",
        *(f"  measured on {speed.source}" for speed in speeds.values()),
        f"disk: {_size(kept)} for the runs, and {_size(passing)} of checkpoints while they are tuned",
    ]
    return Estimate(seconds, kept, passing), lines


def _measured(base: str, place: Path) -> Iterator[float]:
    """Yield the seconds of a step per frame and pixel, of the newest runs in a folder on a base."""
    found = sorted(place.glob("*/steps.jsonl"), key=lambda file: file.stat().st_mtime, reverse=True)[:RECENT]
    for file in found:
        run = RunFiles(file.parent)
        try:
            own, steps = parse_yaml(run.settings), run.steps()[1:]  # the first includes preparations
            if own.get("base") == base and steps:
                settings = TuneSettings.model_construct(**own)
                yield median(step["seconds"] for step in steps) / math.prod(frames_and_pixels(settings))
        except (SettingsError, OSError, KeyError, json.JSONDecodeError):
            continue


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.0f} seconds"


def _size(count: float) -> str:
    units = {1e15: "PB", 1e12: "TB", 1e9: "GB", 1e6: "MB"}
    unit = next((unit for unit in units if count >= unit), 1e6)
    return f"{count / unit:.3g} {units[unit]}"
