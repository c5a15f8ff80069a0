"""Rows of a benchmark made comparable: shares with their spread, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean, and the limits between which it lies in 95 of 100 resamples of the clips."""

    mean: float
    low: float
    high: float


def estimate(edits: Sequence[Mapping[str, Any]], score: str) -> Estimate:
    """Mean of a score over edits (seeds of a clip stay together when clips are resampled)."""
    by_clip = _by_clip(edits, score)
    return _bootstrap(np.array([np.mean(by_clip[clip]) for clip in sorted(by_clip)]))


def difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], score: str) -> Estimate:
    """Mean of ours minus theirs, paired by clip, over the clips that both have."""
    a, b = _by_clip(ours, score), _by_clip(theirs, score)
    return _bootstrap(np.array([np.mean(a[clip]) - np.mean(b[clip]) for clip in sorted(a.keys() & b.keys())]))


def _by_clip(edits: Sequence[Mapping[str, Any]], score: str) -> dict[str, list[float]]:
    grouped: dict[str, list[float]] = {}
    for edit in edits:
        if edit[score] is not None:
            grouped.setdefault(edit["clip"], []).append(float(edit[score]))
    return grouped


def _bootstrap(means: np.ndarray) -> Estimate:
    picks = np.random.default_rng(0).integers(len(means), size=(RESAMPLES, len(means)))
    low, high = np.percentile(means[picks].mean(axis=1), (2.5, 97.5))
    return Estimate(float(means.mean()), float(low), float(high))
