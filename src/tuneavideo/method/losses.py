"""Squared error with min-SNR weights, and the untuned model's loss at every timestep.

Shape letters: B clips, L timesteps, N of them. `alpha` is the cumulative alpha_bar, as in `noise`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss


def min_snr(alpha_B: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Return min-SNR weights (Hang et al. 2023), shape B, with SNR = alpha / (1 - alpha).

    `min(SNR, gamma) / SNR` for noise, `min(SNR, gamma) / (SNR + 1)` for velocity, without a division by `1 - alpha`: an
    alpha of 0 or 1 gives the limit.
    """
    if prediction_type == "epsilon":
        return (gamma * (1 - alpha_B) / alpha_B).clamp(max=1)
    return torch.minimum(alpha_B, gamma * (1 - alpha_B))


def squared_error(prediction: Tensor, expected: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Return the mean squared error (DDPM, eq. 14) as a scalar, each clip's multiplied by its weight."""
    if weight_B is None:
        return mse_loss(prediction, expected)
    return (weight_B * mse_loss(prediction, expected, reduction="none").flatten(1).mean(1)).mean()


def reference_timesteps(total: int, count: int) -> list[int]:
    """Return `count` of `total` timesteps, denser where there is little noise: there the loss changes most."""
    return [round((number / (count - 1)) ** 2 * (total - 1)) for number in range(count)]


def interpolate(alphas_L: Tensor, timesteps: Sequence[int], errors_N: Tensor) -> Tensor:
    """Interpolate losses at N timesteps to all L: their logarithms, linearly in the logarithm of the SNR.

    Args:
        alphas_L: alpha_bar of every timestep, falling.
        timesteps: The N timesteps, rising.
        errors_N: Loss at each of them.
    """
    inside_L = alphas_L.double().cpu().clamp(1e-6, 1 - 1e-6)
    noise_L = ((1 - inside_L) / inside_L).log().numpy()
    known_N = errors_N.double().cpu().clamp(min=1e-12).log().numpy()
    return torch.tensor(np.exp(np.interp(noise_L, noise_L[list(timesteps)], known_N))).float().to(errors_N.device)
