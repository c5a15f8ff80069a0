"""Attention to few keys, such as those of a text, in Triton; only queries have a gradient.

A program holds all keys, so it computes its part of the map at once, and again in the backward pass.
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

HIGH = 64  # queries of a program


@triton.jit
def _tile(q, k, v, L, M, C, heads, scale, D: tl.constexpr, INJECT: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
          COLS: tl.constexpr):  # fmt: skip
    """Return offsets and mask of a program's queries, their attention map, keys and values."""
    rows, n, d = tl.program_id(0) * HIGH + tl.arange(0, HIGH), tl.arange(0, WIDE), tl.arange(0, COLS)
    clip, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    inside = (rows[:, None] < L) & (d[None, :] < D)
    key_mask = (n[:, None] < M) & (d[None, :] < D)
    at = rows[:, None].to(tl.int64) * C + head * D + d[None, :]
    own = clip * L * C + at
    key_offsets = (clip * M + n[:, None]) * C + head * D + d[None, :]
    keys, values = (
        tl.load(k + key_offsets, mask=key_mask, other=0.0),
        tl.load(v + key_offsets, mask=key_mask, other=0.0),
    )
    queries = tl.load(q + (at if INJECT else own), mask=inside, other=0.0)
    s = tl.where(n[None, :] < M, tl.dot(queries, tl.trans(keys)) * scale, -1e30)
    p = tl.exp(s - tl.max(s, 1)[:, None])
    return own, inside, p / tl.sum(p, 1)[:, None], keys, values


@triton.jit
def _forward(q, k, v, y, L, M, C, heads, scale, D: tl.constexpr, INJECT: tl.constexpr, HIGH: tl.constexpr,
             WIDE: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    own, inside, p, _, values = _tile(q, k, v, L, M, C, heads, scale, D, INJECT, HIGH, WIDE, COLS)
    tl.store(y + own, tl.dot(p.to(values.dtype), values).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(q, k, v, dy, dq, L, M, C, heads, scale, D: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
                  COLS: tl.constexpr):  # fmt: skip
    own, inside, p, keys, values = _tile(q, k, v, L, M, C, heads, scale, D, False, HIGH, WIDE, COLS)
    dp = tl.dot(tl.load(dy + own, mask=inside, other=0.0), tl.trans(values))
    ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * scale
    tl.store(dq + own, tl.dot(ds.to(keys.dtype), keys).to(dq.dtype.element_ty), mask=inside)


def _options(v: Tensor, tokens: int, heads: int) -> tuple[tuple[int, int], dict[str, Any]]:
    width = v.shape[2] // heads
    options = {
        "D": width, "HIGH": HIGH, "WIDE": max(16, triton.next_power_of_2(v.shape[1])),
        "COLS": max(16, triton.next_power_of_2(width)), "num_warps": 4,
    }  # fmt: skip
    return (triton.cdiv(tokens, HIGH), len(v) * heads), options


class _FewKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
        (_, tokens, channels), keys = q.shape, v.shape[1]
        grid, options = _options(v, tokens, heads)
        y = q.new_empty(len(v), tokens, channels)
        with torch.cuda.device_of(v):
            _forward[grid](q, k, v, y, tokens, keys, channels, heads, scale, INJECT=len(q) < len(v), **options)
        ctx.save_for_backward(q, k, v)
        ctx.options = heads, scale
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v), (heads, scale), dy = ctx.saved_tensors, ctx.options, gradients[0].contiguous()
        (_, tokens, channels), keys = q.shape, v.shape[1]
        grid, options = _options(v, tokens, heads)
        dq = torch.empty_like(q)
        with torch.cuda.device_of(v):
            _backward[grid](q, k, v, dy, dq, tokens, keys, channels, heads, scale, **options)
        return dq, None, None, None, None


def attend(q_BLC: Tensor, k_BMC: Tensor, v_BMC: Tensor, *, heads: int, scale: float) -> Tensor:
    """Attend to at most 128 keys of at most 128 channels per head: `B L C`.

    Args:
        q_BLC: Queries of B clips, or of one clip, shared by all.
        k_BMC: Keys, without gradient.
        v_BMC: Values, without gradient.
        heads: Number of heads, of which C is a multiple.
        scale: Factor of the products of queries and keys.
    """
    q, k, v = (x.contiguous() for x in (q_BLC, k_BMC, v_BMC))
    return _FewKeys.apply(q, k, v, heads, scale)  # pyright: ignore[reportReturnType]
