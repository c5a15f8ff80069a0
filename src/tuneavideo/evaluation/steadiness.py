"""Third version of the miniature benchmark's scores: whether an edit is good, and its distance to the true edit.

An edit is *good* if it is clean, shows what was requested in `MIN_SHOWN` of its frames, its background flickers at most
`MAX_FLICKER` times as much as the clip's own, its subject changes at most `MAX_SUBJECT` times as much as it must, and
the judge's features are within `MAX_DISTANCE` of the true edit's.
The clip's own and the true edits, which are drawn, pass through the autoencoder before they are compared with.
The thresholds were chosen on drawings: all true edits are good, none with its frames in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tuneavideo import video as videos
from tuneavideo.evaluation.metrics.background import psnr
from tuneavideo.evaluation.metrics.judge import WIDTHS, Judge, Reading
from tuneavideo.evaluation.metrics.judge_metrics import ATTRIBUTES, subject_squares
from tuneavideo.models import codec
from tuneavideo.video import Video

MIN_SHOWN = 7 / 8
"""Smallest fraction of the frames that must show every attribute that the edit changes."""
MAX_FLICKER = 3.0
"""Largest flicker of the background, relative to the clip's own."""
MAX_SUBJECT = 1.5
"""Largest change of the subject, relative to the larger of those of the clip's own and of the true edit."""
MAX_DISTANCE = 0.1
"""Largest mean cosine distance of the judge's features to those of the true edit; people recognise subjects below."""
RADIUS, SHIFT = 10, 3
"""Radius of the disc that is compared around a subject's centre, and the largest error of this centre, in pixels."""
MIN_BYSTANDER_PSNR = 15.0
"""Smallest PSNR, in dB, to the true edit inside a subject that no prompt names."""
MIN_BACKGROUND = 0.05
"""Smallest fraction of a frame that must be background to be measured."""


def flicker(video: Video, *centres_TD: Tensor, camera_TD: Tensor | None = None) -> float | None:
    """Compute the mean absolute change of the background between neighbouring frames.

    Args:
        video: The frames.
        *centres_TD: Centres that the subject may have in every frame, in pixels at 64.
        camera_TD: Position of the camera, x and y, in whole pixels of the frames; frames are aligned by it first.

    Returns:
        Grey levels 0..255, mean of the colours, outside `subject_squares` of both frames. None if hardly any pixel is.
    """
    frames, inside = video.frames_THWC.astype(np.float32), subject_squares(video, *centres_TD)
    steps = [(0, 0)] * (len(frames) - 1) if camera_TD is None else camera_TD.diff(dim=0).tolist()
    changes = []
    for number, (right, down) in enumerate(steps):
        after = np.roll(frames[number + 1], (down, right), (0, 1))
        outside = ~(inside[number] | np.roll(inside[number + 1], (down, right), (0, 1)))
        rows, columns = np.indices(outside.shape)
        outside &= (rows >= down) & (rows < video.height + min(down, 0))
        outside &= (columns >= right) & (columns < video.width + min(right, 0))
        if outside.mean() >= MIN_BACKGROUND:
            changes.append(np.abs(after - frames[number])[outside].mean())
    return float(np.mean(changes)) if changes else None


def colour_change(video: Video, centres_TD: Tensor) -> float:
    """Compute the mean absolute change of the subject between neighbouring frames, in grey levels 0..255.

    The discs of `RADIUS` around the centres are compared at the best of all shifts of up to `SHIFT` pixels, so that
    errors of the centres do not count.
    """
    rows, columns = np.mgrid[-RADIUS:RADIUS, -RADIUS:RADIUS] + 0.5
    disc, far = rows**2 + columns**2 <= RADIUS**2, RADIUS + SHIFT
    padded = np.pad(video.frames_THWC.astype(np.float32), ((0, 0), (far, far), (far, far), (0, 0)), "edge")
    crops = []
    for frame, centre in zip(padded, centres_TD.numpy(), strict=True):
        x, y = np.clip(np.round(centre).astype(int), 0, (video.width, video.height))
        crops.append(frame[y : y + 2 * far, x : x + 2 * far])
    middle, shifts = slice(SHIFT, -SHIFT), [(y, x) for y in range(2 * SHIFT + 1) for x in range(2 * SHIFT + 1)]
    changes = [
        min(
            np.abs(after[y : y + 2 * RADIUS, x : x + 2 * RADIUS] - before[middle, middle])[disc].mean()
            for y, x in shifts
        )
        for before, after in pairwise(crops)
    ]
    return float(np.mean(changes))


def feature_change(reading: Reading) -> float:
    """Compute the mean change of the judge's features at the subject between neighbouring frames, in their own norm."""
    found_TD = reading.features_TD[:, : WIDTHS[-1]]
    return float(found_TD.diff(dim=0).norm(dim=1).mean() / found_TD.norm(dim=1).mean())


@dataclass(frozen=True)
class Changes:
    """Changes between neighbouring frames: `flicker`, `colour_change` and `feature_change` of a clip."""

    flicker: float | None
    colours: float
    features: float

    @classmethod
    def of(cls, video: Video, reading: Reading, track_TD: Tensor, camera_TD: Tensor | None) -> Changes:
        """Measure a clip whose subject should follow a track."""
        background = flicker(video, track_TD, reading.centres_TD, camera_TD=camera_TD)
        return cls(background, colour_change(video, reading.centres_TD), feature_change(reading))

    def subject_ratio(self, *references: Changes) -> float:
        """Return the larger ratio, of colours and features, to the largest of the references."""
        colours, features = (max(getattr(r, name) for r in references) for name in ("colours", "features"))
        return max(self.colours / max(colours, 1e-6), self.features / max(features, 1e-6))


@dataclass(frozen=True)
class References:
    """The true edits of a clip, and the changes that edits are compared with.

    Attributes:
        clip: The clip's attributes.
        track_TD: Centre of the subject in every frame, in pixels at 64.
        camera_TD: Position of the camera in every frame, if it moves.
        truths: True edits, as they were drawn.
        readings: The judge's readings of them.
        own: Changes of the clip, through the autoencoder.
        true: Changes of every true edit, through the autoencoder.
        read: The judge's `read`, which ignores a subject that the prompts do not name.
    """

    clip: Mapping[str, Any]
    track_TD: Tensor
    camera_TD: Tensor | None
    truths: Sequence[Video]
    readings: Sequence[Reading]
    own: Changes
    true: Sequence[Changes]
    read: Callable[[Video], Reading]

    @classmethod
    def of(cls, clip: Mapping[str, Any], source: Video, chosen: slice, pipe: Any, judge: Judge) -> References:
        """Read and measure the references of a bundled clip.

        Args:
            clip: One of `miniature.clips()`.
            source: The frames that were edited.
            chosen: Which of the clip's frames these are.
            pipe: The pipeline whose autoencoder is used.
            judge: The judge.
        """
        truths = true_edits(clip, chosen)
        track, camera = (torch.tensor(clip[name])[chosen] if name in clip else None for name in ("track", "camera"))
        assert track is not None
        bystander = torch.from_numpy(_bystander(clip, source, 1.0)) if "bystander" in clip else None
        read = partial(judge.read, ignored_THW=bystander)

        def changes(video: Video) -> Changes:
            (through,) = codec.decode(pipe, codec.encode(pipe, video)["mean"], video.fps)
            return Changes.of(through, read(through), track, camera)

        own, *true = (changes(video) for video in (source, *truths))
        return cls(clip, track, camera, truths, [read(video) for video in truths], own, true, read)

    def score(self, number: int, video: Video, after: Reading, *, clean: bool) -> dict[str, Any]:
        """Score an edit.

        Args:
            number: Which of the clip's edits it is.
            video: The edited frames.
            after: The judge's reading of them.
            clean: Whether the edit is clean, as `score_edit` decides.

        Returns:
            `good`: see the module. `shown`: fraction of the frames that show all that the edit changes. `flicker` and
            `flicker_ratio`: of the background, in grey levels and relative to the clip's own; None without background.
            `subject_change` and `subject_ratio`: `colour_change`, and the larger ratio of colours and features.
            `true_psnr`, `true_motion_psnr`: PSNR of frames, and of differences between frames, to the true edit, in dB.
            `true_features`: mean cosine distance of the judge's features to those of the true edit, 0..2.
            `bystander_db`: PSNR to the true edit inside a subject that no prompt names, None without one.
        """
        edit, truth = self.clip["edits"][number], self.truths[number]
        changed = [name for name in ATTRIBUTES if edit[name] != self.clip.get(name)]
        seen = zip(*(after.seen[name] for name in changed), strict=True)
        shown = float(np.mean([words == tuple(edit[name] or "none" for name in changed) for words in seen]))
        own = Changes.of(video, after, self.track_TD, self.camera_TD)
        calm = None
        if own.flicker is not None and self.own.flicker is not None:
            calm = own.flicker / max(self.own.flicker, 1e-6)
        subject = own.subject_ratio(self.own, self.true[number])
        steady = (calm is None or calm <= MAX_FLICKER) and subject <= MAX_SUBJECT
        decibels = psnr(truth, video, _bystander(self.clip, video, 0.6)) if "bystander" in self.clip else None
        is_kept = decibels is None or decibels >= MIN_BYSTANDER_PSNR
        distance = float(1 - F.cosine_similarity(after.features_TD, self.readings[number].features_TD).mean())
        return {
            "shown": round(shown, 3), "flicker": _rounded(own.flicker), "flicker_ratio": _rounded(calm),
            "subject_change": _rounded(own.colours), "subject_ratio": _rounded(subject),
            "good": clean and shown >= MIN_SHOWN and steady and is_kept and distance <= MAX_DISTANCE,
            "true_psnr": round(psnr(truth, video, np.ones(video.frames_THWC.shape[:3], bool)), 2),
            "true_motion_psnr": round(_motion_psnr(truth, video), 2),
            "true_features": round(distance, 4), "bystander_db": _rounded(decibels),
        }  # fmt: skip


def true_edits(clip: Mapping[str, Any], chosen: slice) -> list[Video]:
    """Read the drawn true edits of a bundled clip, one per edit, 64 pixels wide; only the chosen frames."""
    together = videos.read(clip["true_edits"])
    parts = np.split(together.frames_THWC[chosen], len(clip["edits"]), axis=2)
    return [Video(np.ascontiguousarray(part), together.fps) for part in parts]


def _bystander(clip: Mapping[str, Any], video: Video, factor: float) -> np.ndarray:
    """Return a mask T H W: a square at the subject that no prompt names, `factor` times as wide as this is."""
    x, y, size = (value * video.width / 64 for value in clip["bystander"])
    rows, columns = np.mgrid[: video.height, : video.width] + 0.5
    inside = np.maximum(abs(columns - x), abs(rows - y)) <= size * factor / 2
    return np.broadcast_to(inside, (video.frames, *inside.shape)).copy()


def _motion_psnr(truth: Video, video: Video) -> float:
    """Compute the PSNR of differences between neighbouring frames, in dB."""
    true, made = (np.diff(clip.frames_THWC.astype(np.float64), axis=0) for clip in (truth, video))
    return float(10 * np.log10(255**2 / max(np.mean((true - made) ** 2), 1e-10)))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
