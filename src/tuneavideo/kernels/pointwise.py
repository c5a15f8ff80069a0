"""Operations on single tokens in Triton, each in one pass over memory."""

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

BLOCK = 1024


@triton.jit
def _gate(x, y, D, COLS: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLS + tl.arange(0, COLS)
    value = tl.load(x + row * 2 * D + d, mask=d < D, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * D + D + d, mask=d < D, other=0.0).to(tl.float32)
    activated = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * D + d, (value * activated).to(y.dtype.element_ty), mask=d < D)


@triton.jit
def _gate_gradient(x, dy, dx, D, COLS: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLS + tl.arange(0, COLS)
    value = tl.load(x + row * 2 * D + d, mask=d < D, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * D + D + d, mask=d < D, other=0.0).to(tl.float32)
    gradient = tl.load(dy + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    slope = cdf + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    tl.store(dx + row * 2 * D + d, (gradient * gate * cdf).to(dx.dtype.element_ty), mask=d < D)
    tl.store(dx + row * 2 * D + D + d, (gradient * value * slope).to(dx.dtype.element_ty), mask=d < D)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows, width = x.numel() // x.shape[-1], x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], width)
        with torch.cuda.device_of(x):
            _gate[(rows, triton.cdiv(width, BLOCK))](x, y, width, COLS=min(BLOCK, triton.next_power_of_2(width)))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,), dy = ctx.saved_tensors, gradients[0].contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1] // 2
        dx = torch.empty_like(x)
        with torch.cuda.device_of(x):
            _gate_gradient[(rows, triton.cdiv(width, BLOCK))](
                x, dy, dx, width, COLS=min(BLOCK, triton.next_power_of_2(width))
            )
        return dx


def gate(x_XE: Tensor) -> Tensor:
    """Multiply the first half of each row by GELU of the second half (GEGLU, Shazeer 2020): `X E` to `X E/2`."""
    return _Gate.apply(x_XE.contiguous())  # pyright: ignore[reportReturnType]


@triton.jit
def _add(x, y, bias, z, count, C, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + tl.load(y + at, mask=inside, other=0.0).to(
        tl.float32
    )
    if BIAS:
        total += tl.load(bias + at % C, mask=inside, other=0.0).to(tl.float32)
    tl.store(z + at, total.to(z.dtype.element_ty), mask=inside)


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, bias: Any) -> Tensor:
        z = torch.empty_like(x)
        ctx.types = x.dtype, y.dtype
        with torch.cuda.device_of(x):
            _add[(triton.cdiv(x.numel(), BLOCK),)](
                x, y, bias, z, x.numel(), x.shape[-1], BIAS=bias is not None, BLOCK=BLOCK
            )
        return z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dz, (of_x, of_y) = gradients[0], ctx.types
        of_bias = dz.flatten(0, -2).float().sum(0) if ctx.needs_input_grad[2] else None
        return dz.to(of_x), dz.to(of_y), of_bias


def add(x_XC: Tensor, y_XC: Tensor, bias_C: Tensor | None = None) -> Tensor:
    """Add two tensors and a bias of the last dimension: `X C`, in the precision of the first."""
    return _Add.apply(x_XC.contiguous(), y_XC.contiguous(), bias_C)  # pyright: ignore[reportReturnType]


@triton.jit
def _layer_norm(x, more, weight, bias, total, y, means, rstds, rows, C, eps, ADD: tl.constexpr, AFFINE: tl.constexpr,
                ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (c[None, :] < C)
    at = row[:, None] * C + c[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value = (value + tl.load(more + at, mask=inside, other=0.0).to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, value, mask=inside)
        value = value.to(tl.float32)
    mean = tl.sum(value, 1) / C
    deviation = tl.where(inside, value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(deviation * deviation, 1) / C + eps)
    tl.store(means + row, mean, mask=row < rows)
    tl.store(rstds + row, rstd, mask=row < rows)
    deviation = deviation * rstd[:, None]
    if AFFINE:
        deviation = deviation * tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        deviation += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, deviation.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm_gradient(x, weight, means, rstds, dy, dtotal, dx, rows, C, ADD: tl.constexpr, AFFINE: tl.constexpr,
                         ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    row, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (row[:, None] < rows) & (c[None, :] < C)
    at = row[:, None] * C + c[None, :]
    mean = tl.load(means + row, mask=row < rows, other=0.0)
    rstd = tl.load(rstds + row, mask=row < rows, other=0.0)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    normal = tl.where(inside, (value - mean[:, None]) * rstd[:, None], 0.0)
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if AFFINE:
        d = d * tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    a = tl.sum(d, 1) / C
    b = tl.sum(d * normal, 1) / C
    gradient = (d - a[:, None] - normal * b[:, None]) * rstd[:, None]
    if ADD:
        gradient += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Any, weight: Any, bias: Any, eps: float) -> Any:
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        total = x if more is None else torch.empty_like(x)
        y = torch.empty_like(x)
        means = x.new_empty(2, rows, dtype=torch.float32)
        cols = triton.next_power_of_2(width)
        high = max(1, 4096 // cols)
        with torch.cuda.device_of(x):
            _layer_norm[(triton.cdiv(rows, high),)](
                x, more, weight, bias, total, y, means[0], means[1], rows, width, eps,
                ADD=more is not None, AFFINE=weight is not None, ROWS=high, COLS=cols,
            )  # fmt: skip
        ctx.save_for_backward(total, weight, means)
        ctx.added = more is not None
        ctx.set_materialize_grads(False)
        return y if more is None else (total, y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (total, weight, means), (dtotal, dy) = ctx.saved_tensors, gradients if ctx.added else (None, *gradients)
        if dy is None:
            return dtotal, dtotal if ctx.added else None, None, None, None
        rows, width = total.numel() // total.shape[-1], total.shape[-1]
        dx, cols = torch.empty_like(total), triton.next_power_of_2(width)
        high = max(1, 4096 // cols)
        with torch.cuda.device_of(total):
            _layer_norm_gradient[(triton.cdiv(rows, high),)](
                total, weight, means[0], means[1], dy.contiguous(), None if dtotal is None else dtotal.contiguous(), dx,
                rows, width, ADD=dtotal is not None, AFFINE=weight is not None, ROWS=high, COLS=cols,
            )  # fmt: skip
        return dx, dx if ctx.added else None, None, None, None


def layer_norm(
    x_XC: Tensor, more_XC: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Return `x + more` and its layer normalisation, `X C` each; weight and bias have no gradient."""
    more = None if more_XC is None else more_XC.contiguous()
    x = x_XC.contiguous()
    made: Any = _LayerNorm.apply(x, more, weight, bias, eps)
    return (x, made) if more is None else made


@triton.jit
def _gather(x, index, y, K, F, size, BLOCK: tl.constexpr):
    """Copy frames of `size` numbers."""
    entry = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    frame = (entry // F) * K + tl.load(index + entry % F).to(tl.int64)
    tl.store(y + entry * size + at, tl.load(x + frame * size + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def _gather_gradient(dy, dfirst, index, dx, K, F, size, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    clip, row = entry // K, entry % K
    total = tl.zeros((BLOCK,), tl.float32)
    if FIRST:
        if row == 0:
            total += tl.load(dfirst + clip * size + at, mask=inside, other=0.0).to(tl.float32)
    for f in range(F):
        if tl.load(index + f).to(tl.int64) == row:
            total += tl.load(dy + (clip * F + f) * size + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + entry * size + at, total.to(dx.dtype.element_ty), mask=inside)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        clips, frames = x.shape[:2]
        size = x[0, 0].numel()
        y = x.new_empty(clips, len(index), *x.shape[2:])
        with torch.cuda.device_of(x):
            _gather[(clips * len(index), triton.cdiv(size, 2 * BLOCK))](
                x, index, y, frames, len(index), size, BLOCK=2 * BLOCK
            )
        ctx.save_for_backward(index)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return x[:, :1].clone(), y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (index,), (dfirst, dy) = ctx.saved_tensors, gradients
        dfirst = None if dfirst is None else dfirst.contiguous()
        if dy is None:
            index, dy = index[:0], dfirst
        dy = dy.contiguous()  # pyright: ignore[reportOptionalMemberAccess]
        clips, frames = ctx.shape[:2]
        dx = dy.new_empty(ctx.shape)
        size = dx[0, 0].numel()
        with torch.cuda.device_of(dy):
            _gather_gradient[(clips * frames, triton.cdiv(size, BLOCK))](
                dy, dfirst, index, dx, frames, len(index), size, FIRST=dfirst is not None, BLOCK=BLOCK
            )
        return dx, None


def gather(x_BKLC: Tensor, index_F: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first frame of each clip, `B 1 L C`, and the frames numbered in `index_F`, `B F L C`."""
    return _Gather.apply(x_BKLC.contiguous(), index_F)  # pyright: ignore[reportReturnType]
