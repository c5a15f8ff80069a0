"""Estimates of the bytes that a job writes in its run folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tuneavideo.errors import DiskError
from tuneavideo.settings import Sampling
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import AnyVideo, DiskVideo

# Upper bounds of an edit's size in each format, as fractions of its raw size.
FORMATS = {"mp4": 0.25, "gif": 0.4, "frames": 1.05}
# Upper bounds of headers in bytes: of a video, of a tensor, of a text file.
VIDEO, TENSOR, TEXT = 10_000, 600, 4_000


def latents(moments: Mapping[str, Any]) -> float:
    """Return the bytes of `latents.safetensors`."""
    return sum(map(_bytes, moments.values())) + TENSOR * len(moments)


def video(clip: AnyVideo, form: str = "mp4", *, columns: int = 1) -> float:
    """Return an upper bound of the bytes of a clip, or of `columns` clips side by side, in the format `form`."""
    pictures = clip.frames if form == "frames" else 1
    sound = 0 if clip.sound_SC is None or form != "mp4" else clip.sound_SC.nbytes
    return FORMATS[form] * _raw(clip) * columns + FORMATS["mp4"] * sound + columns * VIDEO + TENSOR * pictures


def edits(clip: AnyVideo, settings: Sampling, count: int) -> float:
    """Return an upper bound of the bytes of `count` edits."""
    one = sum(video(clip, form) for form in settings.formats) + video(clip, columns=2) + TEXT
    return count * one


def inversion(moments: Mapping[str, Any], settings: Sampling) -> float:
    """Return an upper bound of the bytes of an inversion: with attention injection or a mask, latents of every step.

    With `strength` below 1 it has fewer steps.
    """
    steps = settings.inversion_steps + 1 if settings.needs_trajectory else 1
    return steps * _bytes(moments["mean"]) + TENSOR


def temporary(clip: AnyVideo, moments: Mapping[str, Any], settings: Sampling, *, kept: bool) -> float:
    """Return the bytes of the temporary files of edits of a clip on disk; edits of others need none.

    These are the trajectory of the inversion, unless it is `kept`, and the frames of the edits of one batch.
    """
    if not isinstance(clip, DiskVideo):
        return 0
    own = 0 if kept or not settings.needs_trajectory else inversion(moments, settings)
    return own + settings.batch_prompts * _raw(clip)


def check_edits(
    run: RunFolder, settings: Sampling, clip: AnyVideo, moments: Mapping[str, Any], count: int, *, kept: bool
) -> None:
    """Raise DiskError when the disk cannot hold `count` edits; `kept` says whether their inversion exists."""
    steps = 0 if kept else inversion(moments, settings)
    videos, passing = edits(clip, settings, count), temporary(clip, moments, settings, kept=kept)
    needed, free, size = steps + videos + passing, atomic.free(run.path), atomic.size
    if needed > free:
        parts = f"inversion {size(steps)}, videos {size(videos)}, temporary files {size(passing)}"
        raise DiskError(
            f"{run.path}: {count} edits need {size(needed)} ({parts}), {size(free)} are free there; make room, or ask "
            "for fewer prompts or seeds"
        )


def _raw(clip: AnyVideo) -> int:
    """Return the bytes of the frames."""
    return 3 * clip.frames * clip.height * clip.width


def _bytes(tensor: Any) -> int:
    """Return the bytes of a tensor."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize
