"""The loss: squared error with min-SNR weights, and the loss of the untuned model at every timestep.

Shape letters: B clips, C channels, T frames, H W sides. A level `alpha` is the fraction of signal, as in `noise`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss


def min_snr(alpha_B: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Weight of each level (Hang et al. 2023), with SNR = alpha / (1 - alpha).

    `min(SNR, gamma) / SNR` for the noise, `min(SNR, gamma) / (SNR + 1)` for the velocity; written without a division
    by the noise, so that levels 0 and 1 have their limits.
    """
    if prediction_type == "epsilon":
        return (gamma * (1 - alpha_B) / alpha_B).clamp(max=1)
    return torch.minimum(alpha_B, gamma * (1 - alpha_B))


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
