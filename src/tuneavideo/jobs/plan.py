"""Plan of a job, in lines that are shown before it starts. This module must not import torch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tuneavideo import miniature
from tuneavideo.bases import BASES, Base
from tuneavideo.settings import EditSettings, Sampling, TuneSettings
from tuneavideo.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from tuneavideo.video import Span

TOY = "a toy that draws 16 subjects at 64 x 64 pixels; --base sd1.5 makes real pictures"
NAMED = 8  # unknown words in a line
REPEATED = 0.95  # pictures of the clip per frame taken, below which frames repeat
MUCH_LARGER = 2  # multiple of the area of the base's training, above which there is a warning


def choose_frames(settings: TuneSettings) -> Span:
    """Return the frames of the clip that `settings` take. Raises VideoError when the clip is shorter."""
    from tuneavideo import video as videos  # slow to import, and not needed for help

    return videos.choose_span(
        settings.video, usual=default_frames(settings.base), count=settings.num_frames, start=settings.start,
        stride=settings.stride, start_time=settings.start_time, sample_fps=settings.sample_fps,
    )  # fmt: skip


def visible_devices() -> list[str]:
    """Return the GPUs that a worker process gets each; without a GPU one worker has the CPU."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [each.strip() for each in chosen.split(",") if each.strip()] or ["cpu"]
    found = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len([*found.iterdir()]))] if found.is_dir() else ["default"]


def base_of(settings: EditSettings) -> str:
    """Return the base that edits are made with: `edit_model`, or the run's own."""
    return settings.edit_model or RunFolder.open(settings.run).read_settings().base


def default_frames(base: str) -> int:
    """Return the number of frames that a base is tuned on by default."""
    return BASES[base].frames if base in BASES else Base.frames


def describe_base(base: str) -> str:
    """Describe the base that is loaded."""
    about = f": {TOY}" if base == "miniature" else f" ({BASES[base].note})" if base in BASES else ""
    return f"loading {base}{about}"


def describe_tuning(
    settings: TuneSettings, span: Span, taken: int, size: tuple[int, int], *, is_tuned: bool = True
) -> str:
    """Describe a tuning, or edits without one, on `taken` frames of `size` (width and height in pixels)."""
    steps = f"{settings.max_train_steps} step{'s' * (settings.max_train_steps != 1)}" if is_tuned else "no tuning"
    pace = f"{settings.sample_fps:g} a second" if settings.sample_fps else f"every {_ordinal(span.stride or 1)}"
    end = span.begin + taken * span.step
    end = min(end, span.seconds) if span.seconds > span.begin else end
    fewer = not settings.num_frames and taken < default_frames(settings.base)
    return (
        f"{os.path.basename(settings.video)}: {taken} of {span.total} frames ({pace}{', no more are there' * fewer}), "
        f"{_seconds(span.begin)} to {_seconds(end)} s of {_seconds(span.seconds)} s, at {size[0]} x {size[1]}; {steps}"
        + (f", then {_edits(settings, len(settings.edit))}" if settings.edit else "")
    )


def describe_edits(settings: EditSettings, frames: int, size: tuple[int, int]) -> str:
    """Describe edits of `frames` frames of `size` (width and height in pixels)."""
    return f"{_edits(settings, len(settings.prompt))}: {frames} frame{'s' * (frames != 1)} at {size[0]} x {size[1]}"


def frame_warnings(span: Span, taken: int) -> Iterator[str]:
    """Yield a warning if `taken` is one frame, or if frames repeat."""
    if taken == 1:
        yield (
            "warning: one frame shows no motion to learn; take more frames of a clip that moves (--num-frames, a "
            "smaller --stride, an earlier start)"
        )
    elif span.stride is None and span.seconds and span.step * span.total / span.seconds < REPEATED:
        yield (
            f"warning: the clip has {span.total / span.seconds:.4g} frames a second, and {1 / span.step:g} are taken, "
            "so that frames repeat; lower --sample-fps"
        )


def size_warnings(base: str, size: tuple[int, int], trained: int, *, is_set: bool = True) -> Iterator[str]:
    """Yield a warning if frames are much larger than those of the base's training.

    Args:
        base: Name of the base.
        size: Width and height in pixels.
        trained: Side of the base's training pictures in pixels.
        is_set: Whether the size is set, and does not follow from the clip's shape.
    """
    times = size[0] * size[1] / trained**2
    if times > MUCH_LARGER:
        yield (
            f"warning: {base} was trained at {trained} x {trained}; {size[0]} x {size[1]} takes more than {times:.0f} "
            "times as long and does not look better; "
            + ("leave the size out" if is_set else f"--width {trained} --height {trained} takes the middle of the clip")
        )


def unknown_word_warnings(base: str, prompts: Iterable[str]) -> Iterator[str]:
    """Yield a warning if the miniature does not know words of prompts; tokens in angle brackets are embeddings."""
    if base == "miniature" and (words := miniature.unknown_words(re.sub("<[^>]*>", " ", " ".join(prompts)))):
        shown = ", ".join(words[:NAMED]) + ", ..." * (len(words) > NAMED)
        yield f"warning: the miniature does not know {shown}; these words have no effect"


def steps_ahead(settings: Sampling, edits: int) -> dict[str, int]:
    """Return the number of steps of each stage for a number of edits."""
    batches = math.ceil(edits / settings.batch_prompts)
    return {"invert": settings.inversion_steps, "edit": batches * settings.num_inference_steps} if edits else {}


def _edits(settings: Sampling, prompts: int) -> str:
    edits, steps = prompts * len(settings.seeds), settings.num_inference_steps
    return f"{edits} edit{'s' * (edits != 1)} of {steps} step{'s' * (steps != 1)}"


def _seconds(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return "frame" if number == 1 else f"{number}{ending}"
