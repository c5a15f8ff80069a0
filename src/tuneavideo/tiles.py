"""Attention in bf16 on CPUs, a tile of the map at a time.

torch's kernel for CPUs computes bf16 by way of float32 unless there are tile instructions (AMX), and then twice as
slowly as products in bf16; with them it is the faster one, but for maps of few keys and maps that several clips share.
As in FlashAttention (Dao et al. 2022, algorithms 1 and 4) the map is never whole and is made again on the way back; as
a tile holds whole rows, softmax is the plain one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Numbers of the map that are made at a time: 4 MB of bf16, which caches hold.
TILE = 2**21
# Of so many keys one tells about how high a row rises.
COARSE = 8
# Where there are tile instructions, maps of fewer keys and of more clips are still made faster so.
FEW, SHARED = 64, 2


def suit(k_NMC: Tensor, clips: int) -> bool:
    """Whether this is faster for maps of such keys, each with the values of so many clips."""
    slow = clips > SHARED or k_NMC.shape[1] < FEW or not _has_tiles()
    return k_NMC.dtype == torch.bfloat16 and k_NMC.device.type == "cpu" and slow


@cache
def _has_tiles() -> bool:
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))


def attend(q_NLD: Tensor, k_NMD: Tensor, v_NME: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v: `N L E`, within the rounding of bf16; values may be wider than keys."""
    return _Tiled.apply(q_NLD, k_NMD, v_NME, scale)  # pyright: ignore[reportReturnType]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        y = q.new_empty(*q.shape[:2], v.shape[2])
        for some, rows in _tiles(len(q), q.shape[1], k.shape[1]):
            y[some, rows] = torch.bmm(_map(q[some, rows], k[some], scale), v[some])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v), dy = ctx.saved_tensors, gradients[0]
        dq, (dk, dv) = torch.empty_like(q), (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for some, rows in _tiles(len(q), q.shape[1], k.shape[1]):
            p = _map(q[some, rows], k[some], ctx.scale)
            dv[some] += torch.bmm(p.mT, dy[some, rows])
            ds = torch._softmax_backward_data(torch.bmm(dy[some, rows], v[some].mT), p, -1, p.dtype)
            dq[some, rows] = torch.bmm(ds, k[some])
            dk[some] += torch.bmm(ds.mT, q[some, rows])
        return dq * ctx.scale, (dk * ctx.scale).to(k.dtype), dv.to(v.dtype), None


def _map(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """A tile of the map. Scores are taken less about the highest of their row, so that few bits are lost with it."""
    nothing, k_turned = q.new_empty(1, 1, 1), k.mT
    near = torch.baddbmm(nothing, q, k_turned[..., ::COARSE], beta=0, alpha=scale).amax(-1, keepdim=True)
    return torch.baddbmm(near, q, k_turned, beta=-1, alpha=scale).softmax(-1)


def _tiles(batch: int, rows: int, looked: int) -> Iterator[tuple[slice, slice]]:
    """Of a batch and its rows, as many at a time as a tile holds."""
    high = min(rows, max(1, TILE // looked))
    wide = max(1, TILE // (high * looked))
    for first in range(0, batch, wide):
        for top in range(0, rows, high):
            yield slice(first, first + wide), slice(top, top + high)
