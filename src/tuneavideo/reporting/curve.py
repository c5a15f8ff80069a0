"""Loss curve as SVG paths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tuneavideo.reporting.contents import Run

MAX_POINTS = 500  # more would overlap


class Line(NamedTuple):
    """The loss of a run.

    Attributes:
        points: SVG path of its points, in a view box of 100 x 100.
        smooth: SVG path of the smoothed line.
        last: Last value of the smoothed loss.
    """

    points: str
    smooth: str
    last: float


class Curve(NamedTuple):
    """The losses of several runs.

    Attributes:
        relative: Whether losses are divided by the untuned model's at the same timesteps.
        lines: A line per run; None for a run without logged steps.
        across: Ticks of the step axis: position from the left in percent, and label.
        up: Ticks of the loss axis: position from the top in percent, and label.
    """

    relative: bool
    lines: list[Line | None]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


def curve(runs: Sequence[Run]) -> Curve | None:
    """Compute the curve on a logarithmic scale; None when nothing was logged."""
    relative = all(step.relative_loss is not None for run in runs for step in run.steps)
    points = [
        [(s.number, max((s.relative_loss if relative else s.loss) or 0, 1e-9)) for s in run.steps] for run in runs
    ]
    series = [np.array(each).reshape(-1, 2) for each in points]
    losses = np.concatenate([each[:, 1] for each in series])
    if not len(losses):
        return None
    last = max(each[-1, 0] for each in series if len(each))
    low, high = np.log10(losses.min()) - 0.05, np.log10(losses.max()) + 0.05

    def line(steps_N2: np.ndarray) -> Line | None:
        if not len(steps_N2):
            return None
        x, smooth = 100 * steps_N2[:, 0] / last, smoothed(steps_N2[:, 1])
        y, z = (100 * (high - np.log10(loss)) / (high - low) for loss in (steps_N2[:, 1], smooth))
        some = slice(None, None, math.ceil(len(x) / MAX_POINTS))
        points = "".join(f"M{a:.2f} {b:.2f}h0" for a, b in zip(x[some], y[some], strict=True))
        return Line(
            points, "M" + "L".join(f"{a:.2f} {b:.2f}" for a, b in zip(x[some], z[some], strict=True)), smooth[-1]
        )

    across = [(100 * number / last, f"{number:g}") for number in _round_numbers(last)]
    tens = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    ticks = [
        (100 * (high - math.log10(ten)) / (high - low), f"{ten:g}") for ten in tens if low < math.log10(ten) < high
    ]
    return Curve(
        relative, [line(each) for each in series], across, ticks[:: math.ceil(len(ticks) / 6)] if ticks else []
    )


def smoothed(losses_N: np.ndarray) -> np.ndarray:
    """Smooth losses with a Gaussian whose standard deviation is a thirtieth of their number, at least 1."""
    spread = max(1.0, len(losses_N) / 30)
    reach = math.ceil(3 * spread)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / spread) ** 2)
    inside = slice(reach, reach + len(losses_N))
    return np.convolve(losses_N, weights)[inside] / np.convolve(np.ones_like(losses_N), weights)[inside]


def _round_numbers(last: float) -> list[int]:
    """Return 0 and at most five round numbers up to `last`."""
    steps = (factor * 10**power for power in range(12) for factor in (1, 2, 5))
    step = next(step for step in steps if last / step <= 5)
    return list(range(0, int(last) + 1, step))
