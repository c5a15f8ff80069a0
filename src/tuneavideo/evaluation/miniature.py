"""The miniature benchmark: bundled clips with true tracks, four edits each, tuned, edited and read by the judge.

A row of its ledger is one clip of one variant (a choice of settings, or the untuned control) and seed; rows that are
there already are not computed again. Every clip is computed by one thread, so that the same row comes out to the last
digit whatever else runs.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tuneavideo import miniature
from tuneavideo import video as videos
from tuneavideo.config import checked, layers
from tuneavideo.errors import MemoryShort
from tuneavideo.evaluation.metrics.judge import Judge, Reading
from tuneavideo.jobs import plan
from tuneavideo.method import editing, inversion
from tuneavideo.method.deepcache import reusing
from tuneavideo.method.inflate import VideoUNet, inflate
from tuneavideo.method.noise import Levels
from tuneavideo.method.tuning import Tuning
from tuneavideo.models import codec, pipelines, quiet
from tuneavideo.settings import Sampling, TuneSettings
from tuneavideo.storage import cache
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
) -> Iterator[dict[str, Any] | None]:
    """Compute what the ledger lacks, clip by clip; yields every row wanted, those it had first.

    While rows are computed it yields None every second, so that a caller can stop.

    Args:
        variants: What to compare.
        ledger: File of JSON lines that rows are read from and added to.
        seeds: Of the new layers and the tuning.
        part: `development` (to choose by) or `report` (to report on).
        clips: How many clips of the part, evenly spread; all if None.
        processes: How many clips are computed at a time, each by one thread.
    """
    chosen = _chosen(part, clips)
    wanted = {
        _key(variant, clip, seed): (variant, clip, seed) for clip in chosen for variant in variants for seed in seeds
    }
    had = {row["key"]: row for row in read(ledger)}
    yield from (had[key] for key in wanted if key in had)
    for row in _computed({key: what for key, what in wanted.items() if key not in had}, processes):
        if row:
            with ledger.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        yield row


def count(variants: Sequence[Variant], seeds: Sequence[int], part: str, clips: int | None) -> int:
    """How many rows `benchmark` yields."""
    return len(_chosen(part, clips)) * len(variants) * len(seeds)


def _chosen(part: str, clips: int | None) -> list[dict[str, Any]]:
    chosen = [clip for clip in miniature.clips() if clip["set"] == part]
    return chosen[:: max(1, len(chosen) // clips)][:clips] if clips else chosen


def _computed(wanted: Mapping[str, tuple], processes: int) -> Iterator[dict[str, Any] | None]:
    """Rows in the order in which they are finished, and None every second; closing it ends the processes at once."""
    before = {*multiprocessing.active_children()}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), quiet.hush) as pool:
        with _without_interrupts():
            waiting = {pool.submit(_row, key, *what) for key, what in wanted.items()}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                yield from [run.result() for run in done] or [None]
        except BrokenProcessPool as error:
            raise MemoryShort(
                "a process that computed a clip was ended from outside, as systems do when memory runs out; "
                "give fewer --processes; the same command goes on"
            ) from error
        finally:
            if waiting:
                for process in {*multiprocessing.active_children()} - before:
                    process.terminate()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes started in here do not see Ctrl-C, which a terminal sends to them, too."""
    if threading.current_thread() is not threading.main_thread():  # where handlers cannot be set
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def read(ledger: Path) -> list[dict[str, Any]]:
    """The rows of a ledger."""
    return [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()] if ledger.is_file() else []


def edits_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All edits of some rows, each with the `variant`, `clip` and `seed` it is of."""
    return [edit | {name: row[name] for name in ("variant", "clip", "seed")} for row in rows for edit in row["edits"]]


def _key(variant: Variant, clip: Mapping[str, Any], seed: int) -> str:
    unseen = {"video", "mixed_precision"}  # precision is always full here
    own = _settings(variant, clip, seed).model_dump(mode="json", exclude=unseen, exclude_defaults=True)
    return cache.key(_weights(), own, variant.tuned)


def _settings(variant: Variant, clip: Mapping[str, Any], seed: int) -> TuneSettings:
    stated = {"video": str(clip["path"]), "prompt": clip["caption"], "stride": 2, "num_frames": 8, "seed": seed}
    return checked(TuneSettings, layers({**stated, **variant.settings}, {}))


def _weights() -> str:
    return cache.key(*(file.read_bytes() for file in sorted(miniature.MODEL.rglob("*.safetensors"))))


def _row(key: str, variant: Variant, clip: Mapping[str, Any], seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    settings = _settings(variant, clip, seed)
    source, made, spent = _edited(settings, [edit["prompt"] for edit in clip["edits"]], tuned=variant.tuned)
    judge = Judge.open()
    before = judge.read(source)
    track = torch.tensor(clip["track"])[settings.start :: settings.stride][: source.frames]
    edits = [
        judged(edit, clip, before, judge.read(video), source, video, track)
        for edit, video in zip(clip["edits"], made, strict=True)
    ]
    about = {"key": key, "variant": variant.name, "settings": dict(variant.settings), "tuned": variant.tuned}
    return about | {"clip": clip["name"], "set": clip["set"], "seed": seed, "edits": edits} | spent


def _edited(settings: TuneSettings, prompts: Sequence[str], *, tuned: bool) -> tuple[Video, list[Video], dict]:
    """The clip as it was used, its edits, and seconds and operations of each stage."""
    pipe = pipelines.open_image_model(settings.base, device="cpu")
    side = codec.default_size(pipe)
    span = plan.frames(settings)
    clip = videos.read(
        settings.video, start=settings.start, stride=span.stride or 1, count=span.count, size=(side, side)
    )
    moments, levels = codec.encode(pipe, clip), Levels.of(pipe.scheduler)
    empty = codec.embed(pipe, [settings.negative_prompt])
    video = inflate(pipe.unet, settings.inflation, seed=settings.seed)
    stages: dict[str, Any] = {}
    if tuned:
        stages["tune"] = _tune(pipe, video, settings, moments)
    pipe.unet.requires_grad_(False).eval()
    sampler, clean = editing.sampler_of(levels, settings), moments["mean"]
    path = inversion.path_to(sampler, levels, settings.inversion_steps, settings.timestep_spacing)
    with _noted(stages, "invert", video) as counted:
        *_, inverted = editing.invert(counted, levels, clean, empty, path)
    text, caption = codec.embed(pipe, list(prompts)), codec.embed(pipe, [settings.prompt])
    generators = [torch.Generator().manual_seed(settings.seed) for _ in prompts]
    with _noted(stages, "edit", video, settings.feature_reuse) as counted:
        *_, last = editing.edit(
            counted, levels, sampler, settings, inverted.trajectory, clean, caption, text, empty, generators
        )  # fmt: skip
    return clip, codec.decode(pipe, last.latents, clip.fps), {"stages": stages}


def _tune(pipe: Any, video: VideoUNet, settings: TuneSettings, moments: dict[str, Tensor]) -> dict[str, Any]:
    """Tune, or take the weights of the same tuning from the cache: variants of editing share them."""
    own = settings.model_dump(mode="json", exclude=set(Sampling.model_fields))
    caption, empty = (codec.embed(pipe, [text]) for text in (settings.prompt, ""))
    tuning = Tuning(video, Levels.of(pipe.scheduler), moments, caption, settings, Accelerator(cpu=True), empty)
    batch = _operations(lambda: tuning.learn(0))
    measuring = _operations(tuning.measure) if settings.early_stopping is not None else 0
    pipe.unet.zero_grad()

    def learned() -> dict[str, Tensor]:
        began = time.perf_counter()
        losses = [told.loss for told in tuning]
        told = (tuning.number, len(tuning.measured), np.mean(losses[-20:]), time.perf_counter() - began)
        return {name: value.clone() for name, value in tuning.learned().items()} | {"told": torch.tensor(told)}

    kept = cache.cached(cache.key("tuned", _weights(), moments["mean"], own), learned)
    steps, measured, loss, seconds = kept.pop("told").tolist()
    with torch.no_grad():
        for name, value in kept.items():
            pipe.unet.get_parameter(name).copy_(value)
    operations = batch * steps * settings.gradient_accumulation_steps + measuring * measured
    return {"tflop": round(operations / 1e12, 4), "seconds": round(seconds, 2), "steps": int(steps), "loss": loss}


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


class _Counted:
    """A video UNet that counts the operations of its calls.

    Each shape and way of calling is looked at once; where features are used again calls differ, and all are.
    """

    def __init__(self, video: VideoUNet, reuse: int) -> None:
        self.video, self.clip, self.total, self.alike = reusing(video, reuse), video.clip, 0, reuse == 1
        self.each: dict[tuple, int] = {}

    def __call__(self, *given: Any) -> Tensor:
        if not self.alike:
            made: list[Tensor] = []
            self.total += _operations(lambda: made.append(self.video(*given)))
            return made[0]
        kind = (tuple(given[0].shape), self.clip.led)
        if kind not in self.each:
            self.each[kind] = _operations(lambda: self.video(*given))
        self.total += self.each[kind]
        return self.video(*given)


@contextmanager
def _noted(stages: dict[str, Any], name: str, video: VideoUNet, reuse: int = 1) -> Iterator[Any]:
    """Note the seconds of a stage and the operations of the UNet, which it calls through what is yielded."""
    began, counted = time.perf_counter(), _Counted(video, reuse)
    yield counted
    stages[name] = {"tflop": round(counted.total / 1e12, 4), "seconds": round(time.perf_counter() - began, 2)}


def _operations(work: Callable[[], Any]) -> int:
    """Floating-point operations of some work; attention is counted through its plain form, which the counter knows."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()
