"""Attention along time at every site of a clip, where its tokens lie, in Triton.

A program takes one head of a few sites: their frames are the rows of one small matrix, whose map is masked so that a
frame sees those of its own site only. Nothing is moved to another order beforehand.
"""

# Where nothing is computed on GPUs there is no Triton.
# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # of a matrix: frames, filled up to a power of two, of as many sites as fit


@triton.jit
def _sites(L, heads, T, TIMES: tl.constexpr, ROWS: tl.constexpr):
    """Clip, head, and for each row: its site, frame and whether there is one."""
    SITES: tl.constexpr = ROWS // TIMES
    blocks = tl.cdiv(L, SITES)
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    row = tl.arange(0, ROWS)
    site = (rest % blocks) * SITES + row // TIMES
    time = row % TIMES
    return (rest // blocks).to(tl.int64), head, site, time, (time < T) & (site < L)


@triton.jit
def _map(q, k, site, real, scale, EXACT: tl.constexpr):
    if EXACT:
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        s = tl.dot(q, tl.trans(k))
    seen = (site[:, None] == site[None, :]) & real[None, :]
    s = tl.where(seen, s * scale, -1e30)
    p = tl.where(seen, tl.exp(s - tl.max(s, 1)[:, None]), 0.0)
    return p / tl.maximum(tl.sum(p, 1), 1e-30)[:, None]


@triton.jit
def _forward(q, k, v, y, L, C, T, heads, scale, D: tl.constexpr, LED: tl.constexpr, EXACT: tl.constexpr,
             TIMES: tl.constexpr,
             ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    clip, head, site, time, real = _sites(L, heads, T, TIMES, ROWS)
    d = tl.arange(0, COLS)
    inside = real[:, None] & (d[None, :] < D)
    at = (time[:, None].to(tl.int64) * L + site[:, None]) * C + head * D + d[None, :]
    own = clip * T * L * C + at
    asked = at if LED else own
    p = _map(
        tl.load(q + asked, mask=inside, other=0.0), tl.load(k + asked, mask=inside, other=0.0), site, real, scale, EXACT
    )
    told = tl.load(v + own, mask=inside, other=0.0)
    if EXACT:
        seen = tl.dot(p, told, input_precision="ieee")
    else:
        seen = tl.dot(p.to(told.dtype), told)
    tl.store(y + own, seen.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(q, k, v, dy, dq, dk, dv, L, C, T, heads, scale, D: tl.constexpr, EXACT: tl.constexpr, TIMES: tl.constexpr,
              ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    clip, head, site, time, real = _sites(L, heads, T, TIMES, ROWS)
    d = tl.arange(0, COLS)
    inside = real[:, None] & (d[None, :] < D)
    at = clip * T * L * C + (time[:, None].to(tl.int64) * L + site[:, None]) * C + head * D + d[None, :]
    asking, asked = tl.load(q + at, mask=inside, other=0.0), tl.load(k + at, mask=inside, other=0.0)
    p = _map(asking, asked, site, real, scale, EXACT)
    told, lost = tl.load(v + at, mask=inside, other=0.0), tl.load(dy + at, mask=inside, other=0.0)
    if EXACT:
        of_v = tl.dot(tl.trans(p), lost, input_precision="ieee")
        dp = tl.dot(lost, tl.trans(told), input_precision="ieee")
    else:
        of_v = tl.dot(tl.trans(p.to(lost.dtype)), lost)
        dp = tl.dot(lost, tl.trans(told))
    tl.store(dv + at, of_v.to(dv.dtype.element_ty), mask=inside)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * scale
    if EXACT:
        of_q = tl.dot(ds, asked, input_precision="ieee")
        of_k = tl.dot(tl.trans(ds), asking, input_precision="ieee")
    else:
        ds = ds.to(asked.dtype)
        of_q = tl.dot(ds, asked)
        of_k = tl.dot(tl.trans(ds), asking)
    tl.store(dq + at, of_q.to(dq.dtype.element_ty), mask=inside)
    tl.store(dk + at, of_k.to(dk.dtype.element_ty), mask=inside)


def _options(
    q: Tensor, v: Tensor, frames: int, heads: int
) -> tuple[tuple[int], tuple[int, int, int, int], dict[str, Any]]:
    images, sites, channels = v.shape
    times = max(1, triton.next_power_of_2(frames))
    width = channels // heads
    grid = (images // frames * heads * triton.cdiv(sites, ROWS // times),)
    options = {
        "D": width, "EXACT": q.dtype == torch.float32, "TIMES": times, "ROWS": ROWS,
        "COLS": max(16, triton.next_power_of_2(width)), "num_warps": 4,
    }  # fmt: skip
    return grid, (sites, channels, frames, heads), options


class _AlongTime(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, frames: int, heads: int, scale: float) -> Tensor:
        grid, sizes, options = _options(q, v, frames, heads)
        y = torch.empty_like(v)
        with torch.cuda.device_of(v):
            _forward[grid](q, k, v, y, *sizes, scale, LED=len(q) < len(v), **options)
        ctx.save_for_backward(q, k, v)
        ctx.told = frames, heads, scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v), (frames, heads, scale), dy = ctx.saved_tensors, ctx.told, gradients[0].contiguous()
        if len(q) < len(v):
            raise NotImplementedError("attention injection has no gradients; it is used in edits only")
        grid, sizes, options = _options(q, v, frames, heads)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        with torch.cuda.device_of(v):
            _backward[grid](q, k, v, dy, dq, dk, dv, *sizes, scale, **options)
        return dq, dk, dv, None, None, None


def attend(q_NLC: Tensor, k_NLC: Tensor, v_NLC: Tensor, *, frames: int, heads: int, scale: float) -> Tensor:
    """Attention of every token to those of the same site in the other frames of its clip: `N L C`.

    Args:
        q_NLC: Queries of `frames` images a clip, at most 64; or of the first clip alone, whose maps all others take.
        k_NLC: Keys of the same.
        v_NLC: Values of all clips.
        frames: Of a clip.
        heads: C is a multiple of it.
        scale: Of the products of queries and keys.
    """
    q, k, v = (x.contiguous() for x in (q_NLC, k_NLC, v_NLC))
    return _AlongTime.apply(q, k, v, frames, heads, scale)  # pyright: ignore[reportReturnType]
