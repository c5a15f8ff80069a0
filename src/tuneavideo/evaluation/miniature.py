"""The miniature benchmark: bundled clips with true tracks are tuned, edited with four prompts and scored by the judge.

A row of its results is one clip, variant (settings, or the untuned control) and seed. Rows in the file are not computed
again. Every clip is computed by one thread, so that a row is the same to the last digit. Rows of version 3 have the
scores of `steadiness` as well; the others are those of version 1. Rows of earlier versions are computed again.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from scipy.ndimage import binary_dilation
from torch import Tensor

from tuneavideo import miniature
from tuneavideo import video as videos
from tuneavideo.config import checked, layers
from tuneavideo.errors import MemoryShort
from tuneavideo.evaluation.flops import CountingUNet, count_flops
from tuneavideo.evaluation.metrics.background import psnr
from tuneavideo.evaluation.metrics.judge import Judge, Reading
from tuneavideo.evaluation.metrics.judge_metrics import ATTRIBUTES, subject_squares
from tuneavideo.evaluation.steadiness import References, true_edits
from tuneavideo.method import consistency, editing, inversion
from tuneavideo.method.changes import edit_masks
from tuneavideo.method.inflate import VideoUNet, inflate
from tuneavideo.method.noise import NoiseSchedule
from tuneavideo.method.tuning import Tuning
from tuneavideo.models import codec, pipelines, quiet
from tuneavideo.settings import Sampling, TuneSettings
from tuneavideo.storage import cache
from tuneavideo.training.optimizers import make_optimizer
from tuneavideo.video import Video
from tuneavideo.video.flow import neighbour_flows
from tuneavideo.video.masks import Mask

VERSION = 3
PARTS = ("development", "report", "harder", "harder-report")
"""Sets of clips: to choose settings by, and held out; and the same of clips that are harder to edit."""
MAX_TRACK_DISTANCE = 4.0
"""Largest mean distance of a subject from its track, in pixels at 64, at which its motion counts as preserved."""
LEAST_CHANGE, AROUND = 24, 3
"""Smallest change of a masked pixel, in grey levels, and the distance from one at which pixels are masked as well."""
MIN_BACKGROUND_PSNR = 20.0
"""Smallest PSNR outside the subject, in dB, at which an unedited background counts as preserved."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A configuration to compare.

    Attributes:
        name: Name in rows and tables.
        settings: Overrides of the miniature's own settings.
        tuned: Whether the clip is tuned at all.
        masked: Whether each edit is given a mask of the pixels that the true edit changes, and some around them.
    """

    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tuned: bool = True
    masked: bool = False


CONTROL = Variant("untuned", tuned=False)


def benchmark(
    variants: Sequence[Variant],
    file: Path,
    *,
    seeds: Sequence[int] = (0,),
    part: str = "development",
    clips: int | None = None,
    processes: int = 1,
) -> Iterator[dict[str, Any] | None]:
    """Compute the rows that a file lacks, clip by clip.

    Args:
        variants: Configurations to compare.
        file: JSON lines that rows are read from and appended to.
        seeds: Seeds of the new layers and the tuning.
        part: One of `PARTS`.
        clips: Number of clips of the part, evenly spaced; all if None.
        processes: Number of clips computed at a time, each by one thread.

    Yields:
        Every row, those of the file first. None once a second between computed rows, so that a caller can stop.
    """
    runs = {
        _key(variant, clip, seed): (variant, clip, seed)
        for clip in _clips(part, clips) for variant in variants for seed in seeds
    }  # fmt: skip
    done = {row["key"]: row for row in read_rows(file) if row.get("version", 1) == VERSION}
    yield from (done[key] for key in runs if key in done)
    for row in _compute({key: run for key, run in runs.items() if key not in done}, processes):
        if row:
            _append(file, row)
        yield row


def count(variants: Sequence[Variant], seeds: Sequence[int], part: str, clips: int | None) -> int:
    """Return the number of rows that `benchmark` yields."""
    return len(_clips(part, clips)) * len(variants) * len(seeds)


def _clips(part: str, count: int | None) -> list[dict[str, Any]]:
    clips = [clip for clip in miniature.clips(harder=part.startswith("harder")) if clip["set"] == part]
    return clips[:: max(1, len(clips) // count)][:count] if count else clips


def _compute(runs: Mapping[str, tuple], processes: int) -> Iterator[dict[str, Any] | None]:
    """Yield rows as they are finished, and None every second; closing the generator ends the processes at once."""
    before = {*multiprocessing.active_children()}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), quiet.silence_libraries) as pool:
        with _without_interrupts():
            waiting = {pool.submit(_row, key, *run) for key, run in runs.items()}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                yield from [each.result() for each in done] or [None]
        except BrokenProcessPool as error:
            raise MemoryShort(
                "a worker process was killed, probably because memory ran out; run the same command with fewer "
                "--processes to continue"
            ) from error
        finally:
            if waiting:
                for process in {*multiprocessing.active_children()} - before:
                    process.terminate()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes that ignore Ctrl-C, which a terminal sends to them too."""
    if threading.current_thread() is not threading.main_thread():  # others cannot set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a file, without lines that were cut short; of rows with one key only the last."""
    rows = {}
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        with suppress(ValueError):
            row = json.loads(line)
            rows[row["key"]] = row
    return list(rows.values())


def _append(file: Path, row: Mapping[str, Any]) -> None:
    """Append a row, on a new line even if the last one was cut short."""
    cut_short = file.is_file() and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as lines:
        lines.write("\n" * cut_short + json.dumps(row) + "\n")


def edits_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return all edits of some rows, each with its `variant`, `clip` and `seed`."""
    return [edit | {name: row[name] for name in ("variant", "clip", "seed")} for row in rows for edit in row["edits"]]


def _key(variant: Variant, clip: Mapping[str, Any], seed: int) -> str:
    unused = {"video", "mixed_precision"}  # the benchmark always runs in full precision
    own = _settings(variant, clip, seed).model_dump(mode="json", exclude=unused, exclude_defaults=True)
    return cache.key(_weights(), own, variant.tuned, *(["masked"] if variant.masked else []))


def _settings(variant: Variant, clip: Mapping[str, Any], seed: int) -> TuneSettings:
    own = {"video": str(clip["path"]), "prompt": clip["caption"], "seed": seed}
    own |= {"stride": clip.get("stride", 2), "num_frames": clip.get("num_frames", 8)}
    return checked(TuneSettings, layers({**own, **variant.settings}, {}))


def _weights() -> str:
    return cache.key(*(file.read_bytes() for file in sorted(miniature.MODEL.rglob("*.safetensors"))))


def edits_of_clip(
    variant: Variant, clip: Mapping[str, Any], seed: int
) -> tuple[References, Video, list[Video], dict[str, Any]]:
    """Make the edits of a bundled clip by one thread.

    Args:
        variant: Settings.
        clip: One of `miniature.clips()`.
        seed: Seed of the new layers and the tuning.

    Returns:
        What its edits are compared with, the clip, its edits, and operations and seconds of every stage.
    """
    torch.set_num_threads(1)
    settings = _settings(variant, clip, seed)
    pipe = pipelines.load_image_pipeline(settings.base, device="cpu")
    prompts = [edit["prompt"] for edit in clip["edits"]]
    truths = true_edits(clip, _chosen(settings)) if variant.masked else ()
    source, edited, stages = _edit(pipe, settings, prompts, truths, tuned=variant.tuned)
    return references_of(clip, settings, source, pipe), source, edited, stages


def _row(key: str, variant: Variant, clip: Mapping[str, Any], seed: int) -> dict[str, Any]:
    references, source, edited, stages = edits_of_clip(variant, clip, seed)
    edits = score_edits(references, source, edited)
    return {
        "key": key, "version": VERSION, "variant": variant.name, "settings": dict(variant.settings),
        "tuned": variant.tuned, "clip": clip["name"], "set": clip["set"], "seed": seed, "edits": edits,
        "stages": stages,
    }  # fmt: skip


def references_of(clip: Mapping[str, Any], settings: TuneSettings, source: Video, pipe: Any) -> References:
    """Return what edits of a bundled clip are compared with; `pipe` has the autoencoder."""
    return References.of(clip, source, _chosen(settings), pipe, Judge.open())


def _chosen(settings: TuneSettings) -> slice:
    """Return which of a clip's frames are edited."""
    stride = settings.stride or 1
    assert isinstance(settings.num_frames, int)
    return slice(settings.start, settings.start + stride * settings.num_frames, stride)


def score_edits(references: References, source: Video, edited: Sequence[Video]) -> list[dict[str, Any]]:
    """Return the scores of both versions of all edits of a bundled clip."""
    clip, before, edits = references.clip, references.read(source), []
    for number, (edit, video) in enumerate(zip(clip["edits"], edited, strict=True)):
        after = references.read(video)
        scores = score_edit(edit, clip, before, after, source, video, references.track_TD)
        edits.append(scores | references.score(number, video, after, clean=scores["clean"]))
    return edits


def _edit(
    pipe: Any, settings: TuneSettings, prompts: Sequence[str], truths: Sequence[Video] = (), *, tuned: bool
) -> tuple[Video, list[Video], dict]:
    """Return the source frames, one edit per prompt, and the seconds and TFLOP of each stage.

    True edits, if there are any, give the masks.
    """
    side = codec.default_size(pipe)
    count = settings.num_frames if isinstance(settings.num_frames, int) else None
    clip = videos.read(
        settings.video, start=settings.start, stride=settings.stride or 1, count=count, size=(side, side)
    )
    moments, noise_schedule = codec.encode(pipe, clip), NoiseSchedule.of(pipe.scheduler)
    empty = codec.embed(pipe, [settings.negative_prompt])
    video = inflate(pipe.unet, settings.inflation, seed=settings.seed)
    stages: dict[str, Any] = {}
    if tuned:
        stages["tune"] = _tune(pipe, video, settings, moments)
    pipe.unet.requires_grad_(False).eval()
    sampler, clean = editing.sampler_of(noise_schedule, settings), moments["mean"]
    path = inversion.path_to(sampler, noise_schedule, settings.inversion_steps, settings.timestep_spacing)
    with _measured(stages, "invert", CountingUNet(video)) as unet:
        *_, inverted = editing.invert(unet, noise_schedule, clean, empty, path)
    text, caption = codec.embed(pipe, list(prompts)), codec.embed(pipe, [settings.prompt])
    generators = [torch.Generator().manual_seed(settings.seed) for _ in prompts]
    with _measured(stages, "edit", CountingUNet(video, settings.feature_reuse)) as unet:
        (height, width), is_consistent = clean.shape[3:], settings.temporal_consistency > 0
        flows = neighbour_flows(clip.images, height, width, consistency.RADIUS) if is_consistent else ()
        masks: list[Mask | None] = [_mask(clip, truth) for truth in truths] or [None] * len(prompts)
        if settings.keep:
            masks = edit_masks(clip, None, unet, inverted.trajectory, caption, text, codec.embed(pipe, [""]))
        *_, last = editing.edit(
            unet, noise_schedule, sampler, settings, inverted.trajectory, clean, caption, text, empty, generators,
            flows=flows, mask=codec.latent_masks(masks, clean),
        )  # fmt: skip
    return clip, codec.decode(pipe, last.latents, clip.fps, masks), stages


def _mask(clip: Video, truth: Video) -> Mask:
    changed_THW = np.abs(clip.frames_THWC.astype(int) - truth.frames_THWC).max(3) > LEAST_CHANGE
    around = np.ones((1, 2 * AROUND + 1, 2 * AROUND + 1), bool)
    return Mask(clip, binary_dilation(changed_THW, around))


def _tune(pipe: Any, video: VideoUNet, settings: TuneSettings, moments: dict[str, Tensor]) -> dict[str, Any]:
    """Tune, or load the weights from the cache, which variants that differ in sampling alone share."""
    own = settings.model_dump(mode="json", exclude=set(Sampling.model_fields))
    caption = codec.embed(pipe, [settings.prompt])
    tuning = Tuning(
        video, NoiseSchedule.of(pipe.scheduler), moments, caption, settings, Accelerator(cpu=True), make_optimizer
    )
    per_batch = count_flops(lambda: tuning.accumulate(0))
    pipe.unet.zero_grad()

    def train() -> dict[str, Tensor]:
        began = time.perf_counter()
        losses = [step.loss for step in tuning]
        totals = (tuning.number, np.mean(losses[-20:]), time.perf_counter() - began)
        return {name: value.clone() for name, value in tuning.learned().items()} | {"totals": torch.tensor(totals)}

    weights = cache.cached(cache.key("tuned weights", _weights(), moments["mean"], own), train)
    steps, loss, seconds = weights.pop("totals").tolist()
    with torch.no_grad():
        for name, value in weights.items():
            tuning.parameters[name].copy_(value)
    flops = per_batch * steps * settings.gradient_accumulation_steps
    return {"tflop": round(flops / 1e12, 4), "seconds": round(seconds, 2), "steps": int(steps), "loss": loss}


@contextmanager
def _measured(stages: dict[str, Any], name: str, unet: CountingUNet) -> Iterator[CountingUNet]:
    """Add the seconds of a stage and the operations of its UNet calls to `stages`."""
    began = time.perf_counter()
    yield unet
    stages[name] = {"tflop": round(unet.total / 1e12, 4), "seconds": round(time.perf_counter() - began, 2)}


def score_edit(
    edit: Mapping[str, Any],
    clip: Mapping[str, Any],
    before: Reading,
    after: Reading,
    source: Video,
    video: Video,
    track_TD: Tensor,
) -> dict[str, Any]:
    """Score one edit of a bundled clip by version 1.

    Args:
        edit: Its attributes, `kind` and `prompt`, as in `miniature.clips()`.
        clip: The clip's attributes.
        before: The judge's reading of the source.
        after: The judge's reading of the edit.
        source: The source frames.
        video: The edited frames.
        track_TD: True centre of the subject in every frame, in pixels at 64.

    Returns:
        `success`: most frames show every attribute that the edit changes. `preserved`: most frames show every other
        attribute as the judge read it in the source, and a background that should stay has `MIN_BACKGROUND_PSNR`.
        `track`: mean distance of the subject's centre from the track. `clean`: success, preserved and at most
        `MAX_TRACK_DISTANCE`. `consistency`: mean cosine of the judge's features over all pairs of frames.
        `background_db`: PSNR outside the subject, None if the edit changes background or style.
    """
    changed = [attribute for attribute in ATTRIBUTES if edit[attribute] != clip.get(attribute)]
    kept = [attribute for attribute in ATTRIBUTES if attribute not in changed]
    decibels = None
    if "background" in kept and "style" in kept:
        decibels = psnr(source, video, ~subject_squares(source, track_TD, after.centres_TD))
    success = all(after.shows(attribute, edit[attribute] or "none") for attribute in changed)
    preserved = all(after.shows(attribute, before.most(attribute)) for attribute in kept)
    preserved = preserved and (decibels is None or decibels >= MIN_BACKGROUND_PSNR)
    track = after.track_distance(track_TD)
    return {
        "kind": edit["kind"], "prompt": edit["prompt"], "success": success, "preserved": preserved,
        "track": round(track, 3), "clean": success and preserved and track <= MAX_TRACK_DISTANCE,
        "consistency": round(after.consistency(), 4), "background_db": decibels and round(decibels, 2),
    }  # fmt: skip
