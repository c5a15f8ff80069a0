"""Motion fidelity: similarity of the point tracks of an edit and its source. N tracks, T frames."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tuneavideo.evaluation.metrics.edit_pair import EditPair, NotMeasurable
from tuneavideo.evaluation.metrics.flow import Flow, Flows, consistent_pixels

GRID = 32
"""Most points along the longer side."""
MIN_STEP = 0.002
"""Shortest step that counts as motion, as a fraction of the longer side: 1 pixel at 480, 0.13 at 64."""
MIN_DISTANCE = 0.02
"""Distance from its start beyond which a track counts as moving, as a fraction of the longer side."""


class Tracks(NamedTuple):
    """Tracks of N points.

    Attributes:
        steps: Displacement from frame to frame, as fractions of the longer side, `N T-1 2`.
        visible: Whether the point is visible in a step, `N T-1`.
        moving: Whether the point moves at all, `N`.
    """

    steps: np.ndarray
    visible: np.ndarray
    moving: np.ndarray


def motion_fidelity(pair: EditPair, flow: Flow) -> float:
    """Compute the similarity of the moving tracks of edit and source, -1..1.

    The similarity of two tracks is the mean over time of the cosine of their steps: 1 for two static ones, 0 for a
    static and a moving one. Every moving track has its best match in the other clip. The result is the mean of both
    directions; a direction without moving tracks counts 0, and two static clips have 1.
    Source: Yatim et al. 2024 (DMT), who compare all points: see `motion_fidelity_all`.
    """
    similarity, edit, source = _compare(pair, flow)
    if not (edit.moving.any() or source.moving.any()):
        return 1.0
    return (_mean(similarity.max(axis=1)[edit.moving]) + _mean(similarity.max(axis=0)[source.moving])) / 2


def motion_fidelity_all(pair: EditPair, flow: Flow) -> float:
    """Compute the same over all tracks, static ones too, as in DMT's paper, -1..1.

    Their code divides by the length of a step and gives no number for a static point; here it counts as above. A clip
    with a large static background has a high value even if its subject does not move.
    """
    similarity, *_ = _compare(pair, flow)
    return (_mean(similarity.max(axis=1)) + _mean(similarity.max(axis=0))) / 2


def chain_tracks(flows: Flows) -> Tracks:
    """Track a grid of points of the first frame by chaining flows.

    A track ends when its point is occluded or leaves the frame. Tracks that end in the first half are left out.
    """
    height, width = flows.forward[0].shape[:2]
    longer = max(height, width)
    spacing = longer / min(GRID, longer)
    x, y = np.meshgrid(np.arange(spacing / 2, width, spacing), np.arange(spacing / 2, height, spacing))
    points, alive = np.stack([x.ravel(), y.ravel()], axis=1), np.ones(x.size, bool)
    steps, visible = [], []
    for forward, backward in zip(*flows, strict=True):
        column, row = np.minimum(points.astype(int), (width - 1, height - 1)).T
        alive = alive & consistent_pixels(forward, backward)[row, column]
        steps.append(forward[row, column] * alive[:, None])
        visible.append(alive)
        points = np.clip(points + steps[-1], 0, (width, height))
    steps_NTD, visible_NT = np.stack(steps, axis=1) / longer, np.stack(visible, axis=1)
    kept = visible_NT.mean(axis=1) >= 0.5
    farthest = np.linalg.norm(np.cumsum(steps_NTD, axis=1), axis=2).max(axis=1)
    return Tracks(steps_NTD[kept], visible_NT[kept], farthest[kept] > MIN_DISTANCE)


def track_similarity(edit: Tracks, source: Tracks) -> np.ndarray:
    """Compute the mean cosine of the steps of two tracks while both are visible, edit x source."""
    both_visible = _product(edit.visible, source.visible)
    directions = [_directions(tracks) for tracks in (edit, source)]
    static = [tracks.visible & ~np.any(each, axis=2) for tracks, each in zip((edit, source), directions, strict=True)]
    return (_product(*directions) + _product(*static)) / np.maximum(both_visible, 1)


def _compare(pair: EditPair, flow: Flow) -> tuple[np.ndarray, Tracks, Tracks]:
    if pair.edit.video.frames < 2:
        raise NotMeasurable("one frame does not move")
    edit, source = (chain_tracks(clip.features(flow.flows)) for clip in (pair.edit, pair.source))
    for tracks, name in ((edit, "edit"), (source, "source")):
        if not len(tracks.steps):
            raise NotMeasurable(f"no point of the {name} can be tracked through half of the clip")
    return track_similarity(edit, source), edit, source


def _directions(tracks: Tracks) -> np.ndarray:
    """Steps scaled to length 1, or 0 for a static point."""
    lengths = np.linalg.norm(tracks.steps, axis=2, keepdims=True)
    return np.where(lengths > MIN_STEP, tracks.steps / np.maximum(lengths, MIN_STEP), 0)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.reshape(len(a), -1).astype(np.float64) @ b.reshape(len(b), -1).astype(np.float64).T


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0
