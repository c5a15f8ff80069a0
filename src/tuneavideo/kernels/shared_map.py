"""Attention maps of one clip applied to the values of several clips, in Triton; without gradients.

FlashAttention-2 (Dao 2023) with two differences: the values of all clips are concatenated along channels, so that each
map is computed once; and keys and values are read from the frames of an index, without a copy.
"""

# Triton is not installed everywhere.
# pyright: reportMissingImports=false, reportIndexIssue=false
# Where it is, pyright does not know its launch arguments, constants and ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(q, k, v, index, y, L, M, C, K, F, heads, scale, R: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
          EVEN: tl.constexpr,
          HIGH: tl.constexpr, WIDE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * HIGH + tl.arange(0, HIGH)
    frame, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    d, e = tl.arange(0, DK), tl.arange(0, DV)
    own = (frame * L + rows)[:, None] * C + head * D
    queries = tl.load(q + own + d[None, :], mask=(rows[:, None] < L) & (d[None, :] < D), other=0.0)
    columns = (e // D).to(tl.int64) * K * M * C + head * D + e % D
    maximum = tl.zeros((HIGH,), tl.float32) - 1e30
    total = tl.zeros((HIGH,), tl.float32)
    total_values = tl.zeros((HIGH, DV), tl.float32)
    for r in tl.static_range(R):
        start = tl.load(index + frame * R + r).to(tl.int64) * M * C
        for first in range(0, M, WIDE):
            n = first + tl.arange(0, WIDE)
            of_k = (d[:, None] < D) if EVEN else (d[:, None] < D) & (n[None, :] < M)
            of_v = (e[None, :] < B * D) if EVEN else (e[None, :] < B * D) & (n[:, None] < M)
            s = (
                tl.dot(queries, tl.load(k + start + n[None, :] * C + head * D + d[:, None], mask=of_k, other=0.0))
                * scale
            )
            if not EVEN:
                s = tl.where(n[None, :] < M, s, -1e30)
            new_maximum = tl.maximum(maximum, tl.max(s, 1))
            p = tl.exp2(s - new_maximum[:, None])
            rescale = tl.exp2(maximum - new_maximum)
            total = total * rescale + tl.sum(p, 1)
            values = tl.load(v + start + n[:, None] * C + columns[None, :], mask=of_v, other=0.0)
            total_values = tl.dot(p.to(values.dtype), values, total_values * rescale[:, None])
            maximum = new_maximum
    total_values = total_values / total[:, None]
    out = (frame * L + rows)[:, None] * C + (e // D).to(tl.int64)[None, :] * F * L * C + head * D + (e % D)[None, :]
    tl.store(y + out, total_values.to(y.dtype.element_ty), mask=(rows[:, None] < L) & (e[None, :] < B * D))


def attend(
    q_FLC: Tensor, k_KMC: Tensor, v_BKMC: Tensor, index_FR: Tensor, *, heads: int, scale: float,
    tile: tuple[int, int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Attend from each frame of `q` to the frames `index_FR` of `k`, with the values of each of B clips: `B F L C`.

    Args:
        q_FLC: Queries of the source's frames.
        k_KMC: Keys of the source's K frames.
        v_BKMC: Values of all clips; B times the channels of a head are at most 256.
        index_FR: Numbers of the R frames that each frame refers to, int32.
        heads: Number of heads, of which C is a multiple.
        scale: Factor of the products of queries and keys.
        tile: Queries and keys of a tile, warps and stages, for measurements.
    """
    (frames, tokens, channels), (clips, source_frames, keys, _) = q_FLC.shape, v_BKMC.shape
    q, k, v = (x.contiguous() for x in (q_FLC, k_KMC, v_BKMC))
    y, width = v.new_empty(clips, frames, tokens, channels), channels // heads
    high, wide, warps, stages = tile or ((128, 64, 4, 3) if clips * width <= 128 else (64, 64, 4, 2))
    with torch.cuda.device_of(v):
        _forward[(triton.cdiv(tokens, high), frames * heads)](
            q, k, v, index_FR, y, tokens, keys, channels, source_frames, frames, heads, scale * 1.4426950408889634,
            R=index_FR.shape[1], D=width, B=clips, EVEN=keys % wide == 0, HIGH=high, WIDE=wide,
            DK=max(16, triton.next_power_of_2(width)), DV=max(16, triton.next_power_of_2(clips * width)),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y
