"""The miniature benchmark: bundled clips with true tracks, four edits each, tuned, edited and read by the judge.

A row of its ledger is one clip of one variant (a choice of settings, or the untuned control) and seed; rows that are
there already are not computed again. Every clip is computed by one thread, so that the same row comes out to the last
digit whatever else runs.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tuneavideo import cache, editing, inversion, miniature, models
from tuneavideo import video as videos
from tuneavideo.inflate import inflate
from tuneavideo.metrics.judge import Judge, Reading
from tuneavideo.noise import Levels
from tuneavideo.settings import TuneSettings, checked, layers
from tuneavideo.tuning import Tuning
from tuneavideo.video import Video

NEAR = 4.0
"""Pixels at 64 that a subject may be off its track, on average, for the motion to count as kept."""
KEPT_DB = 20.0
"""PSNR outside the subject from which an unmentioned background counts as kept."""
SUBJECT_SIDE = 40
"""Side, in pixels at 64, of the square around a centre that is not background."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is compared: a name, settings over the miniature's own, and whether the clip is tuned at all."""

    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tuned: bool = True


CONTROL = Variant("untuned", tuned=False)


def benchmark(
    variants: Sequence[Variant],
    ledger: Path,
    *,
    seeds: Sequence[int] = (0,),
    part: str = "development",
    clips: int | None = None,
    processes: int = 1,
) -> Iterator[dict[str, Any]]:
    """Compute what the ledger lacks, clip by clip; yields every row wanted, those it had first.

    Args:
        variants: What to compare.
        ledger: File of JSON lines that rows are read from and added to.
        seeds: Of the new layers and the tuning.
        part: `development` (to choose by) or `report` (to report on).
        clips: How many clips of the part, evenly spread; all if None.
        processes: How many clips are computed at a time, each by one thread.
    """
    chosen = [clip for clip in miniature.clips() if clip["set"] == part]
    chosen = chosen[:: max(1, len(chosen) // clips)][:clips] if clips else chosen
    wanted = {
        _key(variant, clip["name"], seed): (variant, clip, seed)
        for clip in chosen
        for variant in variants
        for seed in seeds
    }
    had = {row["key"]: row for row in read(ledger)}
    yield from (had[key] for key in wanted if key in had)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(_row, key, *what) for key, what in wanted.items() if key not in had]
        try:
            for run in as_completed(runs):
                with ledger.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(run.result()) + "\n")
                yield run.result()
        finally:
            pool.shutdown(cancel_futures=True)


def read(ledger: Path) -> list[dict[str, Any]]:
    """The rows of a ledger."""
    return [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()] if ledger.is_file() else []


def edits_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All edits of some rows, each with the `variant`, `clip` and `seed` it is of."""
    return [edit | {name: row[name] for name in ("variant", "clip", "seed")} for row in rows for edit in row["edits"]]


def _key(variant: Variant, clip: str, seed: int) -> str:
    return cache.key(_weights(), dict(variant.settings), variant.tuned, clip, seed)


def _weights() -> str:
    return cache.key(*(file.read_bytes() for file in sorted(miniature.MODEL.rglob("*.safetensors"))))


def _row(key: str, variant: Variant, clip: Mapping[str, Any], seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    stated = {"video": str(clip["path"]), "prompt": clip["caption"], "stride": 2, "seed": seed}
    settings = checked(TuneSettings, layers({**stated, **variant.settings}, {}))
    source, made, spent = _edited(settings, [edit["prompt"] for edit in clip["edits"]], tuned=variant.tuned)
    judge = Judge.open()
    before = judge.read(source)
    track = torch.tensor(clip["track"])[settings.start :: settings.stride][: settings.num_frames]
    edits = [
        judged(edit, clip, before, judge.read(video), source, video, track)
        for edit, video in zip(clip["edits"], made, strict=True)
    ]
    about = {"key": key, "variant": variant.name, "settings": dict(variant.settings), "tuned": variant.tuned}
    return about | {"clip": clip["name"], "set": clip["set"], "seed": seed, "edits": edits} | spent


def _edited(settings: TuneSettings, prompts: Sequence[str], *, tuned: bool) -> tuple[Video, list[Video], dict]:
    """The clip as it was used, its edits, and seconds and operations of each stage."""
    pipe = models.open_image_model(settings.base, device="cpu")
    side = models.default_size(pipe)
    source = videos.read(
        settings.video, start=settings.start, stride=settings.stride, count=settings.num_frames, size=(side, side)
    )
    moments, levels = models.encode(pipe, source), Levels.of(pipe.scheduler)
    empty = models.embed(pipe, [settings.negative_prompt])
    video = inflate(pipe.unet, settings.inflation, seed=settings.seed)
    stages = {}
    if tuned:
        caption, blank = (models.embed(pipe, [text]) for text in (settings.prompt, ""))
        tuning = Tuning(video, levels, moments, caption, settings, Accelerator(cpu=True), blank)
        batch = _operations(lambda: tuning.learn(0))
        measuring = _operations(tuning.measure) if settings.early_stopping is not None else 0
        pipe.unet.zero_grad()
        with _timed(stages, "tune", 0):
            losses = [told.loss for told in tuning]
        batches = tuning.number * settings.gradient_accumulation_steps
        operations = batch * batches + measuring * len(tuning.measured)
        stages["tune"] |= {"tflop": round(operations / 1e12, 4), "steps": tuning.number}
        stages["tune"]["loss"] = float(np.mean(losses[-20:]))
        with torch.no_grad():
            for name, value in tuning.learned().items():
                pipe.unet.get_parameter(name).copy_(value)
    pipe.unet.requires_grad_(False).eval()
    sampler = levels.sampler(
        settings.sampler,
        settings.num_inference_steps,
        spacing=settings.timestep_spacing,
        strength=settings.strength,
    )
    x, t = moments["mean"], sampler.timesteps[0]
    call = _operations(lambda: video(x, t, empty))
    path = inversion.path_to(sampler, levels, settings.num_inv_steps, settings.timestep_spacing)
    with _timed(stages, "invert", call * len(path)):
        for inverted in inversion.invert(video, levels, x, empty, path):
            x = inverted.latents
    generator = torch.Generator().manual_seed(settings.seed)
    start = editing.mix_noise(x, moments["mean"], sampler.start_alpha, settings.fresh_noise, generator)
    text, count = models.embed(pipe, list(prompts)), len(prompts)
    calls = len(sampler.timesteps) * count * (1 if settings.guidance_scale == 1 else 2)
    with _timed(stages, "edit", call * calls):
        steps = editing.generate(
            video, sampler, start.expand(count, -1, -1, -1, -1), text, empty.expand(count),
            settings.guidance_scale, batch_guidance=settings.batch_guidance, generator=generator,
        )  # fmt: skip
        *_, last = steps
    return source, models.decode(pipe, last.latents, source.fps), {"stages": stages}


def judged(
    edit: Mapping[str, Any],
    clip: Mapping[str, Any],
    before: Reading,
    after: Reading,
    source: Video,
    made: Video,
    track_TD: torch.Tensor,
) -> dict[str, Any]:
    """Scores of one edit.

    `success`: most frames show what the prompt changes. `preserved`: most frames show what the prompt does not change
    as the judge saw it in the source, and a background that should stay is near it (`KEPT_DB`). `track`: mean distance
    of the subject's centre from the true track. `clean`: success, preserved, and within `NEAR` of the track.
    `consistency`: mean cosine of the judge's features over all pairs of frames. `background_db`: PSNR outside the
    subject, for edits that leave background and style alone.
    """
    changed = [kind for kind in ("subject", "background", "style") if edit[kind] != clip.get(kind)]
    kept = [kind for kind in ("subject", "background", "style") if kind not in changed]
    stays = "background" in kept and "style" in kept
    decibels = background_psnr(source, made, track_TD, after.centres_TD) if stays else None
    success = all(after.shows(kind, edit[kind] or "none") for kind in changed)
    preserved = all(after.shows(kind, before.most(kind)) for kind in kept)
    preserved = preserved and (decibels is None or decibels >= KEPT_DB)
    track = after.track_distance(track_TD)
    return {
        "kind": edit["kind"], "prompt": edit["prompt"], "success": success, "preserved": preserved,
        "track": round(track, 3), "clean": success and preserved and track <= NEAR,
        "consistency": round(after.consistency(), 4), "background_db": decibels and round(decibels, 2),
    }  # fmt: skip


def background_psnr(source: Video, made: Video, *centres_TD: torch.Tensor) -> float:
    """PSNR in dB of what lies farther than half of `SUBJECT_SIDE` from all the given centres, over all frames."""
    rows, columns = np.mgrid[0 : source.height, 0 : source.width] + 0.5
    outside = np.ones(source.frames_THWC.shape[:3], bool)
    for centres in centres_TD:
        x, y = (centres.numpy().T * source.width / 64)[:, :, None, None]
        far = np.maximum(abs(columns - x), abs(rows - y)) * 64 / source.width
        outside &= far > SUBJECT_SIDE / 2
    difference = source.frames_THWC[outside].astype(np.float64) - made.frames_THWC[outside]
    return float(10 * np.log10(255**2 / max(np.mean(difference**2), 1e-10)))


class _timed:
    """Notes the seconds of a stage beside its operations."""

    def __init__(self, stages: dict[str, Any], name: str, operations: int) -> None:
        self.stage = stages.setdefault(name, {"tflop": round(operations / 1e12, 4)})

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.stage["seconds"] = round(time.perf_counter() - self.began, 2)


def _operations(work: Callable[[], Any]) -> int:
    """Floating-point operations of some work; attention is counted through its plain form, which the counter knows."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()
