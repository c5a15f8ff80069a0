"""Muon: momentum whose update is made orthogonal, matrix by matrix; it needs fewer pictures than AdamW."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration that drives singular values towards one."""


def orthogonal(matrices_BNM: Tensor, iterations: int = 5) -> Tensor:
    """Compute approximately the nearest orthogonal matrix to each of a batch.

    The iteration `x <- (a + b g + c g g) x`, `g = x x'`, is carried out on the small square `g` alone: every
    factor is a polynomial in `g`, so that their product can be gathered first and meet `x` only once.
    """
    a, b, c = COEFFICIENTS
    tall = matrices_BNM.shape[1] > matrices_BNM.shape[2]
    x = matrices_BNM.mT if tall else matrices_BNM
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    gram, identity = x @ x.mT, torch.eye(x.shape[1], device=x.device)
    product = identity
    for number in range(iterations):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        if number < iterations - 1:
            gram = factor @ gram @ factor
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For weights of two dimensions and more; the size of an update matches AdamW's, so that rates can be shared.

    With several processes each makes its share of the updates and all exchange them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(sorted(parameters, key=_work, reverse=True), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Weights of one shape are made orthogonal together."""
        for group in self.param_groups:
            parameters = group["params"]
            wanted = {p: self._momentum(p, group["momentum"]) for p in parameters}
            share = _share(parameters)
            moves = {p: torch.zeros_like(p) for p in parameters}
            for shape, alike in groupby(sorted(share, key=_shape), key=_shape):
                ours = list(alike)
                made = orthogonal(torch.stack([wanted[p] for p in ours])) * (0.2 * max(shape) ** 0.5)
                moves.update({p: move.view_as(p) for p, move in zip(ours, made, strict=True)})
            for p, move in zip(parameters, _summed([moves[p] for p in parameters]), strict=True):
                p.add_(move, alpha=-group["lr"])

    def _momentum(self, p: nn.Parameter, momentum: float) -> Tensor:
        """Return Nesterov's momentum of a weight as a matrix."""
        average = self.state[p].setdefault("momentum", torch.zeros_like(p))
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum).flatten(1)


def _shape(parameter: nn.Parameter) -> tuple[int, int]:
    return (parameter.shape[0], parameter[0].numel())


def _work(parameter: nn.Parameter) -> int:
    small, large = sorted(_shape(parameter))
    return small * small * (large + 10 * small)


def _share(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Choose the weights that this process makes orthogonal, balanced by their size."""
    if not dist.is_initialized():
        return parameters
    shares: list[list[nn.Parameter]] = [[] for _ in range(dist.get_world_size())]
    load = [0] * len(shares)
    for p in parameters:
        least = load.index(min(load))
        shares[least].append(p)
        load[least] += _work(p)
    return shares[dist.get_rank()]


def _summed(tensors: list[Tensor]) -> list[Tensor]:
    """Sum every tensor over all processes."""
    if not dist.is_initialized():
        return tensors
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


class Pair:
    """Muon for the matrices inside a model, AdamW for everything else, as one optimizer."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embedding.weight" not in name]
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.muon = Muon(matrices, rate)
        self.adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adam.param_groups

    def step(self) -> None:
        self.muon.step()
        self.adam.step()

    def zero_grad(self) -> None:
        self.muon.zero_grad()
        self.adam.zero_grad()

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
