"""Attention between tokens of frames, by the fastest kernel for the device.

Shape letters: B clips, T frames, N = B*T images, L tokens of an image, M keys, R frames referred to, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import chain

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tuneavideo.kernels import supports

# torch's fused kernels take a batch of at most 65,535; temporal attention has one entry per clip and token.
MAX_BATCH = 32768
# Limits of the Triton kernels.
MAX_FRAMES = 64
MAX_KEYS = MAX_HEAD_CHANNELS = 128
MAX_SHARED_CHANNELS = 256  # channels of a head, of all clips together


def attend(q_NLC: Tensor, k_NMC: Tensor, v_NMC: Tensor, *, heads: int, scale: float) -> Tensor:
    """Compute scaled-dot-product attention.

    Args:
        q_NLC: Queries; C is a multiple of `heads`.
        k_NMC: Keys.
        v_NMC: Values. With attention injection those of several clips, one after the other, which all have the given
            queries and keys.
        heads: Number of heads.
        scale: Factor of the products of queries and keys.

    Returns:
        `N L C`, as many as there are values.
    """
    clips = len(v_NMC) // len(q_NLC)
    q_NHLD, k_NHMD, v_NHMD = (rearrange(x, "n l (h d) -> n h l d", h=heads) for x in (q_NLC, k_NMC, v_NMC))
    q_NHLD, k_NHMD = (x.repeat(clips, 1, 1, 1) if clips > 1 else x for x in (q_NHLD, k_NHMD))
    if v_NHMD.is_cuda and len(v_NHMD) <= MAX_BATCH:  # there even a split into one part would copy gradients
        y_NHLD = scaled_dot_product_attention(q_NHLD, k_NHMD, v_NHMD, scale=scale)
    else:
        batches = zip(*(x.split(MAX_BATCH) for x in (q_NHLD, k_NHMD, v_NHMD)), strict=True)
        parts = [scaled_dot_product_attention(*batch, scale=scale) for batch in batches]
        y_NHLD = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rearrange(y_NHLD, "n h l d -> n l (h d)")


def supports_time(x: Tensor, frames: int) -> bool:
    """Return whether `attend_over_time` takes images `x` of clips of so many frames."""
    return frames <= MAX_FRAMES and supports(x, half_only=True)


def attend_over_time(q_NLC: Tensor, k_NLC: Tensor, v_NLC: Tensor, *, frames: int, heads: int, scale: float) -> Tensor:
    """Attend from each token to the tokens at its place in the other frames of its clip: `N L C`, on a GPU."""
    from tuneavideo.kernels import along_time

    return along_time.attend(q_NLC, k_NLC, v_NLC, frames=frames, heads=heads, scale=scale)


def supports_text(x: Tensor, k_BMC: Tensor, v_BMC: Tensor, heads: int) -> bool:
    """Return whether `attend_to_text` takes these keys and values, for queries computed from `x`."""
    trained = k_BMC.requires_grad or v_BMC.requires_grad
    small = k_BMC.shape[1] <= MAX_KEYS and k_BMC.shape[2] <= MAX_HEAD_CHANNELS * heads
    return small and not trained and supports(x, half_only=True)


def attend_to_text(q_BLC: Tensor, k_BMC: Tensor, v_BMC: Tensor, *, heads: int, scale: float) -> Tensor:
    """Attend to the tokens of a text: `B L C`, on a GPU; one clip's queries may serve all clips."""
    from tuneavideo.kernels import few_keys

    return few_keys.attend(q_BLC, k_BMC, v_BMC, heads=heads, scale=scale)


def attend_to_frames(
    q_BTLC: Tensor, k_BTLC: Tensor, v_BTLC: Tensor, frames: Sequence[Sequence[int]], *, heads: int, scale: float
) -> Tensor:
    """Attend from each frame to other frames of its clip: `B T L C`, on a GPU.

    Args:
        q_BTLC: Queries; with attention injection of the source alone.
        k_BTLC: Keys, likewise.
        v_BTLC: Values of all clips.
        frames: R frames that each frame from number `T - len(frames)` on refers to; those before refer to frame 0.
        heads: Number of heads.
        scale: Factor of the products of queries and keys.
    """
    start, clips = q_BTLC.shape[1] - len(frames), len(v_BTLC)
    fits = clips * v_BTLC.shape[3] <= MAX_SHARED_CHANNELS * heads
    if len(q_BTLC) < clips and fits and supports(v_BTLC, half_only=True):
        return _attend_shared(q_BTLC[0], k_BTLC[0], v_BTLC, start, frames, heads, scale)
    from tuneavideo.kernels import pointwise

    # Clip by clip: contiguous tensors are never copied, nor their gradients split.
    index, parts = _index(v_BTLC.device, *chain.from_iterable(frames)), []
    (k_B1LC, k_BXLC), (v_B1LC, v_BXLC) = (pointwise.gather(x, index) for x in (k_BTLC, v_BTLC))
    clipwise = [_clips(x) for x in (q_BTLC, k_B1LC, k_BXLC, v_B1LC, v_BXLC)]
    for number in range(clips):
        q_TLC, k_1LC, k_XLC, v_1LC, v_XLC = (x[number % len(x)] for x in clipwise)
        first_TLC, rest_TLC = q_TLC.split([start, len(frames)])
        if start:
            y_1XC = attend(first_TLC.flatten(0, 1)[None], k_1LC, v_1LC, heads=heads, scale=scale)
            parts.append(y_1XC.unflatten(1, (start, -1))[0])
        if frames:
            k_TMC, v_TMC = (x.unflatten(0, (len(frames), -1)).flatten(1, 2) for x in (k_XLC, v_XLC))
            parts.append(attend(rest_TLC, k_TMC, v_TMC, heads=heads, scale=scale))
    return torch.cat(parts).unflatten(0, (clips, -1))


def _attend_shared(
    q_TLC: Tensor, k_TLC: Tensor, v_BTLC: Tensor, start: int, frames: Sequence[Sequence[int]], heads: int, scale: float
) -> Tensor:
    """Compute each attention map once for all clips."""
    from tuneavideo.kernels import shared_map

    parts = []
    for q_FLC, referred in ((q_TLC[:start], [[0]] * start), (q_TLC[start:], frames)):
        if referred:
            index_FR = _index(q_FLC.device, *chain.from_iterable(referred)).view(len(referred), -1)
            parts.append(shared_map.attend(q_FLC, k_TLC, v_BTLC, index_FR, heads=heads, scale=scale))
    return torch.cat(parts, dim=1)


def _clips(x_BTLC: Tensor) -> Sequence[Tensor]:
    """Return each clip; a single one as a view, whose gradient is not copied."""
    return [x_BTLC.squeeze(0)] if len(x_BTLC) == 1 else x_BTLC.unbind()


@cache
def _index(device: torch.device, *frames: int) -> Tensor:
    return torch.tensor(frames, dtype=torch.int32, device=device)
