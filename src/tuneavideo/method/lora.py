"""Low-rank tuning (LoRA, Hu et al. 2021) of a model that does not know of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class LowRank:
    """Matrices `W = W0 + up @ down` (LoRA, eq. 3) of a model that keeps `W` itself, under its own name.

    The gradients of both factors follow from that of `W`, so the model is not changed: what looks at its weights sees
    the merged ones. Matrices are weights of two and more axes; vectors learn as they are.

    Args:
        weights: What is tuned, by name; `W0` is their value now.
        rank: Of the difference; no more than a matrix can have.
        seed: Of `down`; `up` starts at zero.

    Attributes:
        factors: What the optimiser moves: `up` (rows x rank) and `down` (rank x columns) of each matrix; the vectors.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], rank: int, seed: int) -> None:
        self.matrices = {name: weight for name, weight in weights.items() if weight.ndim > 1}
        self.first = {name: weight.detach().clone() for name, weight in self.matrices.items()}
        self.factors = {name: weight for name, weight in weights.items() if weight.ndim == 1}
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.matrices.items():
            rows, columns = weight.flatten(1).shape
            inner, bound = min(rank, rows, columns), columns**-0.5
            down = torch.empty(inner, columns).uniform_(-bound, bound, generator=generator)
            self.factors[f"{name}.up"] = nn.Parameter(weight.new_zeros(rows, inner))
            self.factors[f"{name}.down"] = nn.Parameter(down.to(weight))

    def restart(self) -> None:
        """Take the weights as they are now for `W0`; `up` and `down` must be as they were made."""
        self.first = {name: weight.detach().clone() for name, weight in self.matrices.items()}

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Chain rule: turn the gradient of every `W` into those of its factors, as autograd would."""
        for name, weight in self.matrices.items():
            up, down = self._factors(name)
            gradient = _gradient(weight).flatten(1)
            up.grad, down.grad, weight.grad = gradient @ down.T, up.T @ gradient, None

    @torch.no_grad()
    def merge(self) -> None:
        """Give the model the weights that the factors make."""
        for name, weight in self.matrices.items():
            up, down = self._factors(name)
            weight.copy_(self.first[name] + (up @ down).view_as(weight))

    def _factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        return self.factors[f"{name}.up"], self.factors[f"{name}.down"]


def _gradient(weight: nn.Parameter) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad
