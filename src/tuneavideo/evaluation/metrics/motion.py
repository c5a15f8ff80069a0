"""Motion fidelity: do the points of the edit move as points of the source do? N tracks, T frames."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tuneavideo.evaluation.metrics.flow import Flow, Flows, seen_again
from tuneavideo.evaluation.metrics.sample import NotMeasurable, Sample

GRID = 32
"""Points along the longer side at most."""
STILL = 0.002
"""A step shorter than this share of the longer side is none: 1 pixel at 480, 0.13 at 64."""
MOVING = 0.02
"""A track that goes farther than this share from where it began moves."""


class Tracks(NamedTuple):
    """Steps of N points (`N T-1 2`, in shares of the longer side), until when they are followed, and which move."""

    steps: np.ndarray
    followed: np.ndarray
    moving: np.ndarray


def motion_fidelity(sample: Sample, flow: Flow) -> float:
    """How like tracks of the source those tracks of the edit are that move, and the other way round, -1..1.

    The likeness of two tracks is the mean over time of the cosine of their steps; two that rest are alike (1), one
    that rests and one that moves are not (0). Every moving track has its best match in the other clip; the mean is
    taken in both directions and halved. Where nothing moves in one clip only, that direction counts 0.
    Source: Yatim et al. 2024 (DMT), who compare all points: see `motion_fidelity_all`.
    """
    alike, edit, source = _compared(sample, flow)
    if not (edit.moving.any() or source.moving.any()):
        return 1.0
    return (_mean(alike.max(axis=1)[edit.moving]) + _mean(alike.max(axis=0)[source.moving])) / 2


def motion_fidelity_all(sample: Sample, flow: Flow) -> float:
    """The same over all tracks, resting ones too, as DMT's paper has it, -1..1.

    Their code divides by the length of a step and so gives no number where a point rests; here such steps count as
    above. A clip of much still background has a high value even if its subject does not move.
    """
    alike, *_ = _compared(sample, flow)
    return (_mean(alike.max(axis=1)) + _mean(alike.max(axis=0))) / 2


def followed(flows: Flows) -> Tracks:
    """Tracks from a grid in the first frame, by flow chained through time.

    A point that is covered or leaves the frame is not followed any further; one that is lost in the first half of
    the clip is left out.
    """
    height, width = flows.forward[0].shape[:2]
    longer = max(height, width)
    spacing = longer / min(GRID, longer)
    x, y = np.meshgrid(np.arange(spacing / 2, width, spacing), np.arange(spacing / 2, height, spacing))
    at, alive = np.stack([x.ravel(), y.ravel()], axis=1), np.ones(x.size, bool)
    steps, seen = [], []
    for forward, backward in zip(*flows, strict=True):
        column, row = np.minimum(at.astype(int), (width - 1, height - 1)).T
        alive = alive & seen_again(forward, backward)[row, column]
        steps.append(forward[row, column] * alive[:, None])
        seen.append(alive)
        at = np.clip(at + steps[-1], 0, (width, height))
    steps_NTD, seen_NT = np.stack(steps, axis=1) / longer, np.stack(seen, axis=1)
    kept = seen_NT.mean(axis=1) >= 0.5
    farthest = np.linalg.norm(np.cumsum(steps_NTD, axis=1), axis=2).max(axis=1)
    return Tracks(steps_NTD[kept], seen_NT[kept], farthest[kept] > MOVING)


def likeness(edit: Tracks, source: Tracks) -> np.ndarray:
    """Mean over the time that both are followed of the cosine of their steps, edit x source; see `motion_fidelity`."""
    together = _product(edit.followed, source.followed)
    turned = [_directions(tracks) for tracks in (edit, source)]
    resting = [tracks.followed & ~np.any(each, axis=2) for tracks, each in zip((edit, source), turned, strict=True)]
    return (_product(*turned) + _product(*resting)) / np.maximum(together, 1)


def _compared(sample: Sample, flow: Flow) -> tuple[np.ndarray, Tracks, Tracks]:
    if sample.edit.video.frames < 2:
        raise NotMeasurable("one frame does not move")
    edit, source = (followed(shown.once(flow.flows)) for shown in (sample.edit, sample.source))
    for tracks, name in ((edit, "edit"), (source, "source")):
        if not len(tracks.steps):
            raise NotMeasurable(f"no point of the {name} can be followed through half of the clip")
    return likeness(edit, source), edit, source


def _directions(tracks: Tracks) -> np.ndarray:
    """Steps of length 1, or 0 where a point rests."""
    lengths = np.linalg.norm(tracks.steps, axis=2, keepdims=True)
    return np.where(lengths > STILL, tracks.steps / np.maximum(lengths, STILL), 0)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.reshape(len(a), -1).astype(np.float64) @ b.reshape(len(b), -1).astype(np.float64).T


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
