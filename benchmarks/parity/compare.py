"""Differences of tensors from the recorded ones, and their bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Largest differences that the rounding of float32 explains, with room for another torch.
FORWARD, LAYER = 2e-5, 1e-5  # absolute
LOSS, REPLAYED_LOSS = 1e-6, 1e-5  # relative
GRADIENT, DDIM, UPDATE = 1e-4, 2e-4, 5e-3  # relative, in the L2 norm
# A gradient that is zero in theory is rounding; gradients below this fraction of all are compared with that fraction.
SMALL = 1e-3


@dataclass(frozen=True)
class Difference:
    """Difference of a tensor from the recorded one, and its bound."""

    tensor: str
    value: float
    bound: float

    @property
    def fraction(self) -> float:
        """The difference divided by its bound; infinite for any difference where none is allowed."""
        return self.value / self.bound if self.bound else math.inf if self.value else 0.0


@dataclass(frozen=True)
class Result:
    """Result of one file: its differences, or the reason why it was `skipped`."""

    name: str
    kind: str
    differences: tuple[Difference, ...] = ()
    unread: int = 0
    skipped: str = ""

    @property
    def worst(self) -> Difference:
        """The difference with the largest fraction of its bound."""
        return max(self.differences, key=lambda each: each.fraction)

    @property
    def ok(self) -> bool:
        """Whether it was compared and no difference exceeds its bound."""
        return not self.skipped and self.worst.fraction <= 1

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name:64} {self.kind:9} SKIPPED: {self.skipped}"
        worst, unread = self.worst, f", {self.unread} unread" if self.unread else ""
        count = f"{len(self.differences)} tensors{unread}"
        verdict = "ok" if self.ok else f"ABOVE ({worst.tensor})"
        return f"{self.name:64} {self.kind:9} {worst.value:.1e} of {worst.bound:.1e}  {count:22} {verdict}"


def absolute(name: str, ours: Tensor, theirs: Tensor, bound: float) -> Difference:
    """Compute the largest difference of any element."""
    if ours.shape != theirs.shape:
        return Difference(f"{name}: shape {tuple(ours.shape)}, recorded {tuple(theirs.shape)}", math.inf, bound)
    return _measured(name, (_here(ours) - _here(theirs)).abs().max(), bound)


def relative(name: str, ours: Tensor, theirs: Tensor, bound: float, least: float = 1e-30) -> Difference:
    """Compute the norm of the difference divided by the recorded norm, or by `least` if that is larger."""
    if ours.shape != theirs.shape:
        return absolute(name, ours, theirs, bound)
    return _measured(name, (_here(ours) - _here(theirs)).norm() / max(float(theirs.norm()), least), bound)


def _here(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def same(name: str, ours: Any, theirs: Any) -> Difference:
    """Compare values that must be equal."""
    return Difference(name, 0.0 if ours == theirs else math.inf, 0.0)


def gradients_agree(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Iterator[Difference]:
    """Compare gradients, or their norms, name by name; the names must be the same."""
    yield same("names of the gradients", sorted(ours), sorted(theirs))
    least = SMALL * math.hypot(*(float(gradient.norm()) for gradient in theirs.values()))
    for name in ours.keys() & theirs.keys():
        yield relative(f"gradient of {name}", ours[name], theirs[name], GRADIENT, least)


def _measured(name: str, value: Tensor, bound: float) -> Difference:
    """Make a difference; NaN counts as infinite."""
    return Difference(name, float(value) if value.isfinite() else math.inf, bound)
