"""Attention of one clip's queries and keys to the values of several clips, in Triton; forward only.

As FlashAttention-2 (Dao 2023), with two differences: values of all clips lie side by side, so that every map is made
once; and the frames that are looked at are read where they are, by their numbers.
"""

# Where nothing is computed on GPUs there is no Triton.
# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _seen(q, k, v, index, y, L, M, C, K, F, heads, scale, R: tl.constexpr, D: tl.constexpr, B: tl.constexpr,
          EVEN: tl.constexpr,
          HIGH: tl.constexpr, WIDE: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0) * HIGH + tl.arange(0, HIGH)
    frame, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    d, e = tl.arange(0, DK), tl.arange(0, DV)
    own = (frame * L + rows)[:, None] * C + head * D
    asking = tl.load(q + own + d[None, :], mask=(rows[:, None] < L) & (d[None, :] < D), other=0.0)
    columns = (e // D).to(tl.int64) * K * M * C + head * D + e % D
    top = tl.zeros((HIGH,), tl.float32) - 1e30
    total = tl.zeros((HIGH,), tl.float32)
    seen = tl.zeros((HIGH, DV), tl.float32)
    for r in tl.static_range(R):
        looked = tl.load(index + frame * R + r).to(tl.int64) * M * C
        for first in range(0, M, WIDE):
            n = first + tl.arange(0, WIDE)
            of_k = (d[:, None] < D) if EVEN else (d[:, None] < D) & (n[None, :] < M)
            of_v = (e[None, :] < B * D) if EVEN else (e[None, :] < B * D) & (n[:, None] < M)
            s = (
                tl.dot(asking, tl.load(k + looked + n[None, :] * C + head * D + d[:, None], mask=of_k, other=0.0))
                * scale
            )
            if not EVEN:
                s = tl.where(n[None, :] < M, s, -1e30)
            above = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - above[:, None])
            less = tl.exp2(top - above)
            total = total * less + tl.sum(p, 1)
            told = tl.load(v + looked + n[:, None] * C + columns[None, :], mask=of_v, other=0.0)
            seen = tl.dot(p.to(told.dtype), told, seen * less[:, None])
            top = above
    seen = seen / total[:, None]
    out = (frame * L + rows)[:, None] * C + (e // D).to(tl.int64)[None, :] * F * L * C + head * D + (e % D)[None, :]
    tl.store(y + out, seen.to(y.dtype.element_ty), mask=(rows[:, None] < L) & (e[None, :] < B * D))


def attend(
    q_FLC: Tensor, k_KMC: Tensor, v_BKMC: Tensor, index_FR: Tensor, *, heads: int, scale: float,
    tile: tuple[int, int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Every frame of `q` looks at frames `index_FR` of `k`, and takes of each of B clips their values: `B F L C`."""
    (frames, tokens, channels), (clips, known, looked, _) = q_FLC.shape, v_BKMC.shape
    q, k, v = (x.contiguous() for x in (q_FLC, k_KMC, v_BKMC))
    y, width = v.new_empty(clips, frames, tokens, channels), channels // heads
    high, wide, warps, stages = tile or ((128, 64, 4, 3) if clips * width <= 128 else (64, 64, 4, 2))
    with torch.cuda.device_of(v):
        _seen[(triton.cdiv(tokens, high), frames * heads)](
            q, k, v, index_FR, y, tokens, looked, channels, known, frames, heads, scale * 1.4426950408889634,
            R=index_FR.shape[1], D=width, B=clips, EVEN=looked % wide == 0, HIGH=high, WIDE=wide,
            DK=max(16, triton.next_power_of_2(width)), DV=max(16, triton.next_power_of_2(clips * width)),
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y
