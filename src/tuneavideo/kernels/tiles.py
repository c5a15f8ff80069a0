"""Attention on CPUs, a tile of the map at a time: in bf16, and wherever several clips share a map.

torch's kernel for CPUs computes bf16 by way of float32 unless there are tile instructions (AMX), and then twice as
slowly as products in bf16; with them it is the faster one forward, but for maps of few keys and maps that several
clips share, and the slower one on the way back.
As in FlashAttention (Dao et al. 2022, algorithms 1 and 4) the map is never whole and is made again on the way back. As
a tile holds whole rows, softmax is the plain one forward; backward it is one exponential, as the logarithm of the
row's sum, and what is subtracted of the map's gradient, are part of the products: three more channels hold them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Numbers of the map that are made at a time: 8 MB of bf16, which caches hold.
TILE = 2**22
# Of so many keys one tells about how high a row rises, unless there are few. Learning, which uses the row's sum again,
# asks all.
COARSE = 8
# Where there are tile instructions, maps of fewer keys and of more clips are still made faster so.
FEW, SHARED = 64, 2


def suit(q_NHLD: Tensor, k_NHMD: Tensor, clips: int) -> bool:
    """Whether this is faster for such queries and keys, each with the values of so many clips."""
    if q_NHLD.device.type != "cpu":
        return False
    if q_NHLD.dtype == torch.float32:
        return clips > SHARED and not q_NHLD.requires_grad
    return q_NHLD.dtype == torch.bfloat16 and (q_NHLD.requires_grad or _slow(k_NHMD.shape[2], clips))


def _slow(keys: int, clips: int) -> bool:
    """Whether torch's own kernel is the slower one forward."""
    return clips > SHARED or keys < FEW or not has_tiles()


@cache
def has_tiles() -> bool:
    """Whether this CPU has tile instructions for bf16."""
    return bool(getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"))


def attend(q_NHLD: Tensor, k_NHMD: Tensor, v_NHME: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v: `N H L E`, within the rounding of the inputs; values may be wider than keys."""
    return _Tiled.apply(q_NHLD, k_NHMD, v_NHME, scale)  # pyright: ignore[reportReturnType]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if v.shape[3] > k.shape[3] or _slow(k.shape[2], 1):
            made = _forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), scale, any(ctx.needs_input_grad))
            y, sums = (x.unflatten(0, q.shape[:2]) for x in made)
        else:
            y, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        ctx.save_for_backward(q, k, v, y, sums)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, y, sums), dy, scale = ctx.saved_tensors, gradients[0], ctx.scale
        middle = math.log(k.shape[2]) / 2  # between the entries of an even row and the entry of one that has no other
        (asking, asked), (telling, told) = _less(q, k, (sums - middle) / scale), _less(dy, v, (y * dy.float()).sum(-1))
        q, k, v, dy = (x.flatten(0, 1) for x in (q, k, v, dy))
        dq, (dk, dv) = torch.empty_like(q), (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        of_q, of_k, of_v, _ = ctx.needs_input_grad
        nothing = q.new_empty(1, 1, 1)
        for some, rows in _tiles(len(q), q.shape[1], k.shape[1]):
            p = torch.baddbmm(nothing, asked[some], asking[some, rows].mT, beta=0, alpha=scale).exp_()
            if of_v:
                dv[some] += torch.bmm(p, dy[some, rows])
            if not (of_q or of_k):
                continue
            ds = torch.bmm(told[some], telling[some, rows].mT).mul_(p)
            if of_q:
                dq[some, rows] = torch.bmm(ds.mT, k[some])
            if of_k:
                dk[some] += torch.bmm(ds, q[some, rows])
        whole = math.exp(-middle)
        found = ((dq, of_q, scale * whole), (dk, of_k, scale * whole), (dv, of_v, whole))
        return *((x * by).to(y.dtype).unflatten(0, y.shape[:2]) if need else None for x, need, by in found), None


def _less(x_NHLD: Tensor, y_NHMD: Tensor, less_NHL: Tensor) -> tuple[Tensor, Tensor]:
    """Two of `G L D+3` and `G M D+3` whose product is that of `x` and `y` less a number of each row of `x`."""
    high = less_NHL.bfloat16()
    middle = (less_NHL - high).bfloat16()
    parts_NHL3 = torch.stack([high, middle, (less_NHL - high - middle).bfloat16()], dim=-1)
    ones_NHM3 = y_NHMD.new_full((1,), -1.0).expand(*y_NHMD.shape[:3], 3)
    return torch.cat([x_NHLD, parts_NHL3], -1).flatten(0, 1), torch.cat([y_NHMD, ones_NHM3], -1).flatten(0, 1)


def _forward(q_GLD: Tensor, k_GMD: Tensor, v_GME: Tensor, scale: float, learned: bool) -> tuple[Tensor, Tensor]:
    """What is seen, and the logarithms of the rows' sums, if anything is learned.

    Scores are taken less about the highest of their row, so that few bits are lost with it.
    """
    y_GLE, sums_GL = q_GLD.new_empty(*q_GLD.shape[:2], v_GME.shape[2]), q_GLD.new_empty(q_GLD.shape[:2]).float()
    nothing, every = q_GLD.new_empty(1, 1, 1), 1 if learned else min(COARSE, 1 + k_GMD.shape[1] // FEW)
    for some, rows in _tiles(len(q_GLD), q_GLD.shape[1], k_GMD.shape[1]):
        q, k_turned = q_GLD[some, rows], k_GMD[some].mT
        near = torch.baddbmm(nothing, q, k_turned[..., ::every], beta=0, alpha=scale).amax(-1, keepdim=True)
        s = torch.baddbmm(near, q, k_turned, beta=-1, alpha=scale)
        p = s.softmax(-1)
        if learned:
            sums_GL[some, rows] = near[..., 0].float() + s.amax(-1).float() - p.amax(-1).float().log()
        y_GLE[some, rows] = torch.bmm(p, v_GME[some])
    return y_GLE, sums_GL


def _tiles(batch: int, rows: int, looked: int) -> Iterator[tuple[slice, slice]]:
    """Of a batch and its rows, as many at a time as a tile holds."""
    high = min(rows, max(1, TILE // looked))
    wide = max(1, TILE // (high * looked))
    for first in range(0, batch, wide):
        for top in range(0, rows, high):
            yield slice(first, first + wide), slice(top, top + high)
