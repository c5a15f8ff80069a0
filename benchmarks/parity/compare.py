"""How far a tensor is from the recorded one, and how far it may be."""

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
# A gradient that is zero on paper is rounding in floats; one below this share of all is measured against that share.
SMALL = 1e-3


@dataclass(frozen=True)
class Difference:
    """How far one tensor is from the recorded one, and how far it may be."""

    tensor: str
    value: float
    bound: float

    @property
    def share(self) -> float:
        """Of the bound; infinite where nothing, or no number, is allowed."""
        return self.value / self.bound if self.bound else math.inf if self.value else 0.0


@dataclass(frozen=True)
class Result:
    """What became of one file: its differences, or why it was `skipped`."""

    name: str
    kind: str
    differences: tuple[Difference, ...] = ()
    unread: int = 0
    skipped: str = ""

    @property
    def worst(self) -> Difference:
        """The one that uses most of its bound."""
        return max(self.differences, key=lambda each: each.share)

    @property
    def ok(self) -> bool:
        """It was compared, and no difference is above its bound."""
        return not self.skipped and self.worst.share <= 1

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name:64} {self.kind:9} SKIPPED: {self.skipped}"
        worst, unread = self.worst, f", {self.unread} unread" if self.unread else ""
        count = f"{len(self.differences)} tensors{unread}"
        verdict = "ok" if self.ok else f"ABOVE ({worst.tensor})"
        return f"{self.name:64} {self.kind:9} {worst.value:.1e} of {worst.bound:.1e}  {count:22} {verdict}"


def absolute(name: str, ours: Tensor, theirs: Tensor, bound: float) -> Difference:
    """Largest difference of any element."""
    if ours.shape != theirs.shape:
        return Difference(f"{name}: shape {tuple(ours.shape)}, recorded {tuple(theirs.shape)}", math.inf, bound)
    return _measured(name, (_here(ours) - _here(theirs)).abs().max(), bound)


def relative(name: str, ours: Tensor, theirs: Tensor, bound: float, least: float = 1e-30) -> Difference:
    """Norm of the difference as a share of the recorded norm (or of `least`, where that is more)."""
    if ours.shape != theirs.shape:
        return absolute(name, ours, theirs, bound)
    return _measured(name, (_here(ours) - _here(theirs)).norm() / max(float(theirs.norm()), least), bound)


def _here(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def same(name: str, ours: Any, theirs: Any) -> Difference:
    """Facts that agree or do not."""
    return Difference(name, 0.0 if ours == theirs else math.inf, 0.0)


def gradients_agree(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Iterator[Difference]:
    """Compare gradients, or their norms, name by name; the names must be the same."""
    yield same("names of the gradients", sorted(ours), sorted(theirs))
    least = SMALL * math.hypot(*(float(gradient.norm()) for gradient in theirs.values()))
    for name in ours.keys() & theirs.keys():
        yield relative(f"gradient of {name}", ours[name], theirs[name], GRADIENT, least)


def _measured(name: str, value: Tensor, bound: float) -> Difference:
    """What is no number is infinitely far."""
    return Difference(name, float(value) if value.isfinite() else math.inf, bound)
