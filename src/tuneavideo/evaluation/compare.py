"""Means of benchmark scores with 95 % confidence intervals over clips, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % confidence interval, by the percentile bootstrap with 10,000 resamples of the clips."""

    mean: float
    low: float
    high: float


def estimate(edits: Sequence[Mapping[str, Any]], score: str) -> Estimate:
    """Estimate the mean of a score over edits; all edits of a clip are resampled together."""
    by_clip = _by_clip(edits, score)
    return _bootstrap([np.mean(by_clip[clip]) for clip in sorted(by_clip)])


def difference(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], score: str) -> Estimate:
    """Estimate the mean of ours minus theirs, paired by clip, over the clips that both have."""
    a, b = _by_clip(ours, score), _by_clip(theirs, score)
    return _bootstrap([np.mean(a[clip]) - np.mean(b[clip]) for clip in sorted(a.keys() & b.keys())])


def _by_clip(edits: Sequence[Mapping[str, Any]], score: str) -> dict[str, list[float]]:
    grouped: dict[str, list[float]] = {}
    for edit in edits:
        if edit.get(score) is not None:
            grouped.setdefault(edit["clip"], []).append(float(edit[score]))
    return grouped


def _bootstrap(values: Sequence[Any]) -> Estimate:
    mean = float(np.mean(values))
    if len(values) < 2:  # which scipy refuses
        return Estimate(mean, mean, mean)
    result = bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0))
    return Estimate(mean, *map(float, result.confidence_interval))
