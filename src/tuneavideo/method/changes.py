"""Sites of a clip that an edit changes: where its predictions for caption and prompt differ.

DiffEdit (Couairon et al. 2022) compares them with a fixed threshold. Here the difference is relative to the effect of
both texts at the site, so that a weak change of the background counts beside a strong one of the subject.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.ndimage import label
from torch import Tensor
from torch.nn.functional import avg_pool3d, max_pool3d

from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.editing import Trajectory
from tuneavideo.video import AnyVideo
from tuneavideo.video.masks import Mask

TIMESTEP = 700
"""Where predictions are compared: shapes are still open, and the clip's layout is visible."""
FLOOR = 0.4
"""Effect of the texts, relative to that at the strongest sites, below which a site counts as unchanged."""
THRESHOLD = 0.4
"""Smallest relative difference of a changed site."""
SMALLEST = 0.02
"""Fraction of the clip below which a connected region is not kept."""


def edit_masks(
    source: AnyVideo,
    given: Mask | None,
    video: Any,
    trajectory: Trajectory,
    caption: Conditions | Tensor,
    text: Conditions,
    empty: Conditions,
) -> list[Mask | None]:
    """Return the mask of each of B edits: the sites that its prompt changes, within the given mask.

    Args:
        source: The clip.
        given: Mask of all edits.
        video: The UNet, as `prepared` returns it; for the rest see `changed_sites`.
        trajectory: Inverted latents of the clip.
        caption: Conditions of the clip's caption.
        text: Conditions of the B prompts.
        empty: Conditions of one empty prompt.
    """
    sites_BTHW = changed_sites(video, trajectory, caption, text, empty).cpu().numpy()
    return [Mask.of_sites(source, _without_islands(sites_THW)).within(given) for sites_THW in sites_BTHW]


def _without_islands(changed_THW: np.ndarray) -> np.ndarray:
    """Change small unchanged regions as well, which would stay as patches of the clip within the edit."""
    regions_THW = np.zeros(changed_THW.shape, np.int32)
    label(~changed_THW, output=regions_THW)
    sizes = np.bincount(regions_THW.ravel())
    return changed_THW | (sizes < SMALLEST * changed_THW.size)[regions_THW]


@torch.no_grad()
def changed_sites(
    video: Any, trajectory: Trajectory, caption: Conditions | Tensor, text: Conditions, empty: Conditions
) -> Tensor:
    """Find the sites that each of B prompts changes.

    Args:
        video: The UNet, as `prepared` returns it.
        trajectory: Inverted latents of the clip.
        caption: Conditions of the clip's caption.
        text: Conditions of the B prompts.
        empty: Conditions of one empty prompt.

    Returns:
        True where an edit changes the clip or one of its neighbours in space or time: `B T H W`.
    """
    number = min(range(len(trajectory.timesteps)), key=lambda i: abs(trajectory.timesteps[i] - TIMESTEP))
    t = trajectory.timesteps[number]
    x = trajectory.latents[number][None].to(empty.text_BLD.device)
    without, own, *others = (
        video(x, torch.tensor(t, device=x.device), each).float()
        for each in (empty, Conditions.of(caption), *text.split(1))
    )
    return torch.cat([_changed(without, own, other) for other in others])


def _changed(without: Tensor, own: Tensor, other: Tensor) -> Tensor:
    difference, effect = _size(other - own), (_size(other - without) + _size(own - without)) / 2
    relative = difference / (effect + FLOOR * effect.flatten().quantile(0.98)).clamp_min(1e-12)
    return max_pool3d((relative > THRESHOLD).float(), 3, 1, 1)[:, 0] > 0


def _size(difference_1CTHW: Tensor) -> Tensor:
    """Return the mean absolute difference around each site, `1 1 T H W`."""
    size = difference_1CTHW.abs().mean(1, keepdim=True)
    return avg_pool3d(size, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
