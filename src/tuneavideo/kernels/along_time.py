"""Temporal attention in Triton, on tokens in the order of images.

A program computes one head at a few sites (places of tokens in a frame). The frames of all its sites are the rows of
one matrix; its attention map is masked so that a frame attends to frames at its own site only.
"""

# Triton is not installed everywhere.
# pyright: reportMissingImports=false, reportIndexIssue=false
# Where it is, pyright does not know its launch arguments, constants and ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # of a program's matrix: frames, padded to a power of two, of as many sites as fit


@triton.jit
def _sites(L, heads, T, TIMES: tl.constexpr, ROWS: tl.constexpr):
    """Return clip and head of a program, and site, frame and mask of each row."""
    SITES: tl.constexpr = ROWS // TIMES
    blocks = tl.cdiv(L, SITES)
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    row = tl.arange(0, ROWS)
    site = (rest % blocks) * SITES + row // TIMES
    time = row % TIMES
    return (rest // blocks).to(tl.int64), head, site, time, (time < T) & (site < L)


@triton.jit
def _map(q, k, site, mask, scale, EXACT: tl.constexpr):
    if EXACT:
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        s = tl.dot(q, tl.trans(k))
    same_site = (site[:, None] == site[None, :]) & mask[None, :]
    s = tl.where(same_site, s * scale, -1e30)
    p = tl.where(same_site, tl.exp(s - tl.max(s, 1)[:, None]), 0.0)
    return p / tl.maximum(tl.sum(p, 1), 1e-30)[:, None]


@triton.jit
def _forward(q, k, v, y, L, C, T, heads, scale, D: tl.constexpr, INJECT: tl.constexpr, EXACT: tl.constexpr,
             TIMES: tl.constexpr,
             ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    clip, head, site, time, mask = _sites(L, heads, T, TIMES, ROWS)
    d = tl.arange(0, COLS)
    inside = mask[:, None] & (d[None, :] < D)
    at = (time[:, None].to(tl.int64) * L + site[:, None]) * C + head * D + d[None, :]
    own = clip * T * L * C + at
    from_source = at if INJECT else own
    p = _map(
        tl.load(q + from_source, mask=inside, other=0.0),
        tl.load(k + from_source, mask=inside, other=0.0),
        site,
        mask,
        scale,
        EXACT,
    )
    values = tl.load(v + own, mask=inside, other=0.0)
    if EXACT:
        out = tl.dot(p, values, input_precision="ieee")
    else:
        out = tl.dot(p.to(values.dtype), values)
    tl.store(y + own, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(q, k, v, dy, dq, dk, dv, L, C, T, heads, scale, D: tl.constexpr, EXACT: tl.constexpr, TIMES: tl.constexpr,
              ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    clip, head, site, time, mask = _sites(L, heads, T, TIMES, ROWS)
    d = tl.arange(0, COLS)
    inside = mask[:, None] & (d[None, :] < D)
    at = clip * T * L * C + (time[:, None].to(tl.int64) * L + site[:, None]) * C + head * D + d[None, :]
    queries, keys = tl.load(q + at, mask=inside, other=0.0), tl.load(k + at, mask=inside, other=0.0)
    p = _map(queries, keys, site, mask, scale, EXACT)
    values, gradient = tl.load(v + at, mask=inside, other=0.0), tl.load(dy + at, mask=inside, other=0.0)
    if EXACT:
        of_v = tl.dot(tl.trans(p), gradient, input_precision="ieee")
        dp = tl.dot(gradient, tl.trans(values), input_precision="ieee")
    else:
        of_v = tl.dot(tl.trans(p.to(gradient.dtype)), gradient)
        dp = tl.dot(gradient, tl.trans(values))
    tl.store(dv + at, of_v.to(dv.dtype.element_ty), mask=inside)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * scale
    if EXACT:
        of_q = tl.dot(ds, keys, input_precision="ieee")
        of_k = tl.dot(tl.trans(ds), queries, input_precision="ieee")
    else:
        ds = ds.to(keys.dtype)
        of_q = tl.dot(ds, keys)
        of_k = tl.dot(tl.trans(ds), queries)
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
            _forward[grid](q, k, v, y, *sizes, scale, INJECT=len(q) < len(v), **options)
        ctx.save_for_backward(q, k, v)
        ctx.options = frames, heads, scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v), (frames, heads, scale), dy = ctx.saved_tensors, ctx.options, gradients[0].contiguous()
        if len(q) < len(v):
            raise NotImplementedError("attention injection has no gradients")
        grid, sizes, options = _options(q, v, frames, heads)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        with torch.cuda.device_of(v):
            _backward[grid](q, k, v, dy, dq, dk, dv, *sizes, scale, **options)
        return dq, dk, dv, None, None, None


def attend(q_NLC: Tensor, k_NLC: Tensor, v_NLC: Tensor, *, frames: int, heads: int, scale: float) -> Tensor:
    """Attend from each token to the tokens at its site in the other frames of its clip: `N L C`.

    Args:
        q_NLC: Queries; with attention injection of the first clip alone, whose maps all clips take.
        k_NLC: Keys, likewise.
        v_NLC: Values of all clips.
        frames: Frames per clip, at most 64.
        heads: Number of heads, of which C is a multiple.
        scale: Factor of the products of queries and keys.
    """
    q, k, v = (x.contiguous() for x in (q_NLC, k_NLC, v_NLC))
    return _AlongTime.apply(q, k, v, frames, heads, scale)  # pyright: ignore[reportReturnType]
