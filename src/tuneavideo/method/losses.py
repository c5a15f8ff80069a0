"""Variants of the loss: the noise levels and the noise it is taken at, and what counts in it.

Shape letters: B clips, C channels, T frames, H W sides. A level `alpha` is the share of signal, as in `noise`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss


def stratified(levels: int, numbers: Sequence[int], seed: int) -> Tensor:
    """Timesteps in 0..levels-1 of the draws with these numbers, counted from 0 over the whole run.

    The van der Corput sequence in base 2, shifted by a random number of the seed: of any 2^k draws from a multiple of
    2^k on, one lies in each of 2^k equal strata. Any single draw is uniform over seeds.
    """
    shift = np.random.default_rng(seed).random()
    return torch.tensor([int((_reversed(number) + shift) % 1 * levels) for number in numbers])


def antithetic(levels: int, numbers: Sequence[int], seed: int) -> Tensor:
    """Timesteps like `stratified`'s: draws 2k and 2k+1 are a random timestep and its mirror, levels-1-t."""
    pairs = [(int(np.random.default_rng((seed, n // 2)).integers(levels)), n % 2) for n in numbers]
    return torch.tensor([levels - 1 - t if mirrored else t for t, mirrored in pairs])


def shared(noise_BCTHW: Tensor, common_BC1HW: Tensor, share: float) -> Tensor:
    """Noise of unit variance whose frames have the covariance `share` (PYoCo's mixed noise, Ge et al. 2023)."""
    return math.sqrt(1 - share) * noise_BCTHW + math.sqrt(share) * common_BC1HW


def min_snr(alpha_B: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weight of each level (Hang et al. 2023), with SNR = alpha / (1 - alpha).

    `min(SNR, gamma) / SNR` for the noise, `min(SNR, gamma) / (SNR + 1)` for the velocity; written without a division
    by the noise, so that levels 0 and 1 have their limits.
    """
    if prediction_type == "epsilon":
        return (gamma * (1 - alpha_B) / alpha_B).clamp(max=1)
    return torch.minimum(alpha_B, gamma * (1 - alpha_B))


def debiased(x_BCTHW: Tensor, anchor_B: Tensor) -> Tensor:
    """`sqrt(2) x` less frame `anchor` of `x` (MotionDirector, Zhao et al. 2023, with beta 1).

    What all frames have in common shrinks to 0.41 of itself; what one frame has for itself grows.
    """
    anchor_BC1HW = x_BCTHW[torch.arange(len(x_BCTHW)), :, anchor_B, None]
    return math.sqrt(2) * x_BCTHW - anchor_BC1HW


def squared_error(prediction: Tensor, wanted: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Mean squared error (DDPM, eq. 14), each clip's times its weight."""
    if weight_B is None:
        return mse_loss(prediction, wanted)
    return (weight_B * mse_loss(prediction, wanted, reduction="none").flatten(1).mean(1)).mean()


def reference_timesteps(levels: int, count: int) -> list[int]:
    """`count` timesteps from 0 to `levels` - 1, denser where there is little noise: there the loss changes most."""
    return [round((number / (count - 1)) ** 2 * (levels - 1)) for number in range(count)]


def at_every_level(alphas_L: Tensor, timesteps: Sequence[int], errors_N: Tensor) -> Tensor:
    """Losses at all timesteps, `L`, from those at a few: their logarithms, linear in the logarithm of the SNR.

    Args:
        alphas_L: Fraction of signal at every timestep, falling.
        timesteps: The few, rising.
        errors_N: Loss at each of them.
    """
    inside_L = alphas_L.double().cpu().clamp(1e-6, 1 - 1e-6)
    noise_L = ((1 - inside_L) / inside_L).log().numpy()
    known_N = errors_N.double().cpu().clamp(min=1e-12).log().numpy()
    return torch.tensor(np.exp(np.interp(noise_L, noise_L[list(timesteps)], known_N))).float().to(errors_N.device)


def settled(measured: Sequence[float], share: float, patience: int) -> bool:
    """Whether the last `patience` measurements are all above `1 - share` times the best one before them."""
    before, last = measured[:-patience], measured[-patience:]
    return bool(before) and min(last) > (1 - share) * min(before)


def _reversed(number: int) -> float:
    """The binary digits of a number, mirrored at the point: 6 = 110 becomes 0.011 = 3/8."""
    return int(f"{number:b}"[::-1], 2) / 2 ** number.bit_length()
