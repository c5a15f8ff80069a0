"""Bytes that a job writes in its run folder, counted before it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tuneavideo.errors import DiskError
from tuneavideo.settings import Sampling
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import AnyVideo, DiskVideo

# Of its raw size, an edit takes less than this in each form: a GIF has a byte of three, packed, PNG packs noise hardly.
FORMS = {"mp4": 0.25, "gif": 0.4, "frames": 1.05}
# What a file of each kind takes beside that: headers, an index, a label; of a tensor its name, type and place.
VIDEO, TENSOR, TEXT = 10_000, 600, 4_000


def latents(moments: Mapping[str, Any]) -> float:
    """Bytes of `latents.safetensors`."""
    return sum(map(_bytes, moments.values())) + TENSOR * len(moments)


def film(clip: AnyVideo, form: str = "mp4", *, columns: int = 1) -> float:
    """Bytes of a file that shows a clip, or `columns` clips side by side, at most."""
    pictures = clip.frames if form == "frames" else 1
    sound = 0 if clip.sound_SC is None or form != "mp4" else clip.sound_SC.nbytes
    return FORMS[form] * _raw(clip) * columns + FORMS["mp4"] * sound + columns * VIDEO + TENSOR * pictures


def edits(clip: AnyVideo, settings: Sampling, count: int) -> float:
    """Bytes of so many folders of edits."""
    one = sum(film(clip, form) for form in settings.formats) + film(clip, columns=2) + TEXT
    return count * one


def inversion(moments: Mapping[str, Any], settings: Sampling) -> float:
    """Bytes of a kept inversion: the latents of every step and the clean ones if edits follow the clip, else the last.

    It may have fewer steps, if sampling starts lower.
    """
    steps = settings.inversion_steps + 1 if settings.attention_injection else 1
    return steps * _bytes(moments["mean"]) + TENSOR


def passing(clip: AnyVideo, moments: Mapping[str, Any], settings: Sampling, *, kept: bool) -> float:
    """Bytes of the temporary files of edits of a clip on disk; edits of others need none.

    These are the trajectory of the inversion, unless it is `kept`, and the frames of the edits of one batch.
    """
    if not isinstance(clip, DiskVideo):
        return 0
    own = 0 if kept or not settings.attention_injection else inversion(moments, settings)
    return own + settings.batch_prompts * _raw(clip)


def check_edits(
    run: RunFolder, settings: Sampling, clip: AnyVideo, moments: Mapping[str, Any], count: int, *, kept: bool
) -> None:
    """Refuse to begin so many edits that the disk cannot hold; `kept` says whether their inversion is there.

    Raises:
        DiskError: It says what is needed and what is there.
    """
    steps = 0 if kept else inversion(moments, settings)
    videos, beside = edits(clip, settings, count), passing(clip, moments, settings, kept=kept)
    needed, free, size = steps + videos + beside, atomic.free(run.path), atomic.size
    if needed > free:
        parts = f"inversion {size(steps)}, videos {size(videos)}, files while they are made {size(beside)}"
        raise DiskError(
            f"{run.path}: {count} edits need {size(needed)} ({parts}), {size(free)} are free there; make room, or ask "
            "for fewer prompts or seeds"
        )


def _raw(clip: AnyVideo) -> int:
    """Bytes of its frames."""
    return 3 * clip.frames * clip.height * clip.width


def _bytes(tensor: Any) -> int:
    """Bytes of a tensor's in memory or on disk."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize
