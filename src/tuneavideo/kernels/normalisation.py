"""Normalisation together with the additions before it, in one kernel each where a GPU has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def to_tokens(x_NCHW: Tensor) -> Tensor:
    """`N C H W` as `N S C`; a view in channels-last format."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(x_NSC: Tensor, like_NCHW: Tensor) -> Tensor:
    """`N S C` as `N C H W`, with the height and width of another map."""
    return x_NSC.unflatten(1, like_NCHW.shape[2:]).permute(0, 3, 1, 2)


def normalise_groups(
    norm: nn.GroupNorm, x_NCHW: Tensor, *, silu: bool = False, shift_NC: Tensor | None = None
) -> Tensor:
    """Apply a group norm, of images or of clips, to `x + shift` on a GPU, and SiLU if set: `N S C`, S = H*W."""
    from tuneavideo.kernels import group_norm

    clip: Any = getattr(norm, "clip", None)
    return group_norm.group_norm(
        to_tokens(x_NCHW), norm.num_groups, norm.weight, norm.bias, norm.eps,
        frames=clip.frames if clip else 1, silu=silu, shift_NC=shift_NC,
    )  # fmt: skip


def add_and_normalise(norm: Any, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return `x + y` and its layer norm, on a GPU; in one kernel unless the norm is trained or of another class."""
    trained = norm.weight is not None and norm.weight.requires_grad and torch.is_grad_enabled()
    if type(norm) is not nn.LayerNorm or trained or len(norm.normalized_shape) != 1:
        total = x if y is None else x + y
        return total, norm(total)
    from tuneavideo.kernels import pointwise

    return pointwise.layer_norm(x, y, norm.weight, norm.bias, norm.eps)


def add(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the sum of two tensors and a bias of the last dimension, in the precision of `x`, on a GPU."""
    from tuneavideo.kernels import pointwise

    return pointwise.add(x, y, bias)
