"""Group normalisation of clips that lie channels last, with what comes before and after it, in Triton.

Three kernels: per-channel moments of pieces of an image; moments of each group of a clip, combined by the formula of
Chan et al. (1979); then the normalised numbers. All sums are in float32.
"""

# Where nothing is computed on GPUs there is no Triton.
# pyright: reportMissingImports=false, reportIndexIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512  # of the first kernel, about: a few for each multiprocessor


@triton.jit
def _moments(
    x, shift, means, squares, HW, C, pieces, piece, SHIFTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Mean and sum of squared deviations of each channel in a piece of an image."""
    image = (tl.program_id(0) // pieces).to(tl.int64)
    first = (tl.program_id(0) % pieces) * piece
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    last = tl.minimum(first + piece, HW)
    x += image * HW * C
    pivot = tl.load(x + first.to(tl.int64) * C + c, mask=c < C, other=0.0).to(tl.float32)
    sums = tl.zeros((COLS,), tl.float32)
    squared = tl.zeros((COLS,), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < last) & (c[None, :] < C)
        at = x + rows[:, None].to(tl.int64) * C + c[None, :]
        away = tl.load(at, mask=inside, other=0.0).to(tl.float32) - pivot[None, :]
        away = tl.where(inside, away, 0.0)
        sums += tl.sum(away, 0)
        squared += tl.sum(away * away, 0)
    count = (last - first).to(tl.float32)
    mean = sums / count
    out = tl.program_id(0).to(tl.int64) * C + c
    tl.store(squares + out, tl.maximum(squared - sums * mean, 0.0), mask=c < C)
    mean += pivot
    if SHIFTED:
        mean += tl.load(shift + image * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(means + out, mean, mask=c < C)


@triton.jit
def _groups(means, squares, weight, bias, scales, offsets, group_means, rstds, HW, C, width, all_pieces, pieces,
            piece, eps,
            AFFINE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Of each clip and group: mean and reciprocal deviation, and what they make of each channel."""
    clip, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, COLS)
    c = group * width + column
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((), tl.float32)
    for start in range(0, all_pieces, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < all_pieces) & (column[None, :] < width)
        count = tl.minimum(HW - (rows % pieces) * piece, piece).to(tl.float32)[:, None]
        at = (clip * all_pieces + rows[:, None]) * C + c[None, :]
        mean = tl.load(means + at, mask=inside, other=0.0)
        sums += tl.sum(tl.where(inside, mean * count, 0.0))
        total += tl.sum(tl.where(inside, count + mean * 0, 0.0))
    middle = sums / total
    squared = tl.zeros((), tl.float32)
    for start in range(0, all_pieces, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < all_pieces) & (column[None, :] < width)
        count = tl.minimum(HW - (rows % pieces) * piece, piece).to(tl.float32)[:, None]
        at = (clip * all_pieces + rows[:, None]) * C + c[None, :]
        away = tl.load(means + at, mask=inside, other=0.0) - middle
        each = tl.load(squares + at, mask=inside, other=0.0)
        squared += tl.sum(tl.where(inside, each + away * away * count, 0.0))
    rstd = 1.0 / tl.sqrt(squared / total + eps)
    tl.store(group_means + clip * groups + group, middle)
    tl.store(rstds + clip * groups + group, rstd)
    scale = tl.zeros((COLS,), tl.float32) + rstd
    offset = -middle * scale
    if AFFINE:
        w = tl.load(weight + c, mask=column < width, other=0.0).to(tl.float32)
        scale = scale * w
        offset = tl.load(bias + c, mask=column < width, other=0.0).to(tl.float32) - middle * scale
    tl.store(scales + clip * C + c, scale, mask=column < width)
    tl.store(offsets + clip * C + c, offset, mask=column < width)


@triton.jit
def _normalise(x, shift, scales, offsets, y, HW, C, frames, tiles, SHIFTED: tl.constexpr, SILU: tl.constexpr,
               ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    clip = image // frames
    scale = tl.load(scales + clip * C + c, mask=c < C, other=0.0)
    offset = tl.load(offsets + clip * C + c, mask=c < C, other=0.0)
    if SHIFTED:
        offset += scale * tl.load(shift + image * C + c, mask=c < C, other=0.0).to(tl.float32)
    inside = (rows[:, None] < HW) & (c[None, :] < C)
    at = image * HW * C + rows[:, None].to(tl.int64) * C + c[None, :]
    z = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_sums(x, dy, shift, scales, offsets, group_means, rstds, sums, products, HW, C, width, groups, frames,
                   pieces, piece, SHIFTED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr,
                   COLS: tl.constexpr):  # fmt: skip
    """Of each channel in a piece: sums of the gradient before the activation, and of it times the normalised input."""
    image = (tl.program_id(0) // pieces).to(tl.int64)
    first = (tl.program_id(0) % pieces) * piece
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    last = tl.minimum(first + piece, HW)
    clip = image // frames
    scale = tl.load(scales + clip * C + c, mask=c < C, other=0.0)
    offset = tl.load(offsets + clip * C + c, mask=c < C, other=0.0)
    mean = tl.load(group_means + clip * groups + c // width, mask=c < C, other=0.0)
    rstd = tl.load(rstds + clip * groups + c // width, mask=c < C, other=0.0)
    if SHIFTED:
        more = tl.load(shift + image * C + c, mask=c < C, other=0.0).to(tl.float32)
        offset += scale * more
        mean -= more
    s = tl.zeros((COLS,), tl.float32)
    p = tl.zeros((COLS,), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < last) & (c[None, :] < C)
        at = image * HW * C + rows[:, None].to(tl.int64) * C + c[None, :]
        seen = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            z = seen * scale[None, :] + offset[None, :]
            part = 1.0 / (1.0 + tl.exp(-z))
            d = d * part * (1.0 + z * (1.0 - part))
        s += tl.sum(d, 0)
        p += tl.sum(d * (seen - mean[None, :]) * rstd[None, :], 0)
    out = tl.program_id(0).to(tl.int64) * C + c
    tl.store(sums + out, s, mask=c < C)
    tl.store(products + out, p, mask=c < C)


@triton.jit
def _gradient_groups(sums, products, weight, first, second, C, width, all_pieces, count, AFFINE: tl.constexpr,
                     ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Of each clip and group: means of the gradient and of it times the normalised input, weighted."""
    clip, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, COLS)
    c = group * width + column
    w = tl.zeros((COLS,), tl.float32) + 1.0
    if AFFINE:
        w = tl.load(weight + c, mask=column < width, other=0.0).to(tl.float32)
    a = tl.zeros((COLS,), tl.float32)
    b = tl.zeros((COLS,), tl.float32)
    for start in range(0, all_pieces, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < all_pieces) & (column[None, :] < width)
        at = (clip * all_pieces + rows[:, None]) * C + c[None, :]
        a += tl.sum(tl.load(sums + at, mask=inside, other=0.0), 0)
        b += tl.sum(tl.load(products + at, mask=inside, other=0.0), 0)
    tl.store(first + clip * groups + group, tl.sum(a * w) / count)
    tl.store(second + clip * groups + group, tl.sum(b * w) / count)


@triton.jit
def _gradient(x, dy, shift, weight, scales, offsets, group_means, rstds, first, second, dx, HW, C, width, groups,
              frames, tiles,
              SHIFTED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    image = (tl.program_id(0) // tiles).to(tl.int64)
    rows = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    clip = image // frames
    g = clip * groups + c // width
    scale = tl.load(scales + clip * C + c, mask=c < C, other=0.0)
    offset = tl.load(offsets + clip * C + c, mask=c < C, other=0.0)
    mean = tl.load(group_means + g, mask=c < C, other=0.0)
    rstd = tl.load(rstds + g, mask=c < C, other=0.0)
    a = tl.load(first + g, mask=c < C, other=0.0)
    b = tl.load(second + g, mask=c < C, other=0.0)
    if SHIFTED:
        more = tl.load(shift + image * C + c, mask=c < C, other=0.0).to(tl.float32)
        offset += scale * more
        mean -= more
    inside = (rows[:, None] < HW) & (c[None, :] < C)
    at = image * HW * C + rows[:, None].to(tl.int64) * C + c[None, :]
    seen = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = seen * scale[None, :] + offset[None, :]
        part = 1.0 / (1.0 + tl.exp(-z))
        d = d * part * (1.0 + z * (1.0 - part))
    normal = (seen - mean[None, :]) * rstd[None, :]
    found = d * scale[None, :] - rstd[None, :] * (a[None, :] + normal * b[None, :])
    tl.store(dx + at, found.to(dx.dtype.element_ty), mask=inside)


def _cut(x_NSC: Tensor) -> tuple[int, int, int, int]:
    """Columns and rows of a tile, sites of a piece of an image, and pieces of an image."""
    images, sites, channels = x_NSC.shape
    cols = min(64, triton.next_power_of_2(channels))
    rows = min(64, triton.next_power_of_2(sites))
    wanted = max(1, PROGRAMS // (images * triton.cdiv(channels, cols)))
    piece = max(rows, triton.next_power_of_2(triton.cdiv(sites, wanted)))
    return cols, rows, piece, triton.cdiv(sites, piece)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Any, weight: Any, bias: Any, groups: int, eps: float, frames: int, silu: bool
    ) -> Tensor:
        images, sites, channels = x.shape
        clips, width = images // frames, channels // groups
        cols, rows, piece, pieces = _cut(x)
        affine, shifted = weight is not None, shift is not None
        numbers = x.new_empty(2, images * pieces, channels, dtype=torch.float32)
        per_channel = x.new_empty(2, clips, channels, dtype=torch.float32)
        per_group = x.new_empty(2, clips, groups, dtype=torch.float32)
        y = torch.empty_like(x)
        blocks = triton.cdiv(channels, cols)
        with torch.cuda.device_of(x):
            _moments[(images * pieces, blocks)](
                x, shift, numbers[0], numbers[1], sites, channels, pieces, piece, SHIFTED=shifted, ROWS=rows, COLS=cols
            )
            _groups[(clips, groups)](
                numbers[0], numbers[1], weight, bias, per_channel[0], per_channel[1], per_group[0], per_group[1],
                sites, channels, width, frames * pieces, pieces, piece, eps,
                AFFINE=affine, ROWS=64, COLS=triton.next_power_of_2(width),
            )  # fmt: skip
            tiles = triton.cdiv(sites, rows)
            _normalise[(images * tiles, blocks)](
                x, shift, per_channel[0], per_channel[1], y, sites, channels, frames, tiles,
                SHIFTED=shifted, SILU=silu, ROWS=rows, COLS=cols,
            )  # fmt: skip
        ctx.save_for_backward(x, shift, weight, per_channel, per_group)
        ctx.told = groups, frames, silu
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, shift, weight, per_channel, per_group), (groups, frames, silu) = ctx.saved_tensors, ctx.told
        dy = gradients[0].contiguous()
        images, sites, channels = x.shape
        clips, width = images // frames, channels // groups
        cols, rows, piece, pieces = _cut(x)
        affine, shifted = weight is not None, shift is not None
        numbers = x.new_empty(2, images * pieces, channels, dtype=torch.float32)
        means = x.new_empty(2, clips, groups, dtype=torch.float32)
        dx = torch.empty_like(x)
        blocks, tiles = triton.cdiv(channels, cols), triton.cdiv(sites, rows)
        with torch.cuda.device_of(x):
            _gradient_sums[(images * pieces, blocks)](
                x, dy, shift, per_channel[0], per_channel[1], per_group[0], per_group[1], numbers[0], numbers[1],
                sites, channels, width, groups, frames, pieces, piece,
                SHIFTED=shifted, SILU=silu, ROWS=rows, COLS=cols,
            )  # fmt: skip
            _gradient_groups[(clips, groups)](
                numbers[0], numbers[1], weight, means[0], means[1], channels, width, frames * pieces,
                float(frames * sites * width), AFFINE=affine, ROWS=64, COLS=triton.next_power_of_2(width),
            )  # fmt: skip
            _gradient[(images * tiles, blocks)](
                x, dy, shift, weight, per_channel[0], per_channel[1], per_group[0], per_group[1], means[0], means[1],
                dx,
                sites, channels, width, groups, frames, tiles, SHIFTED=shifted, SILU=silu, ROWS=rows, COLS=cols,
            )  # fmt: skip
        _, of_shift, of_weight, of_bias, *_ = ctx.needs_input_grad
        return (
            dx,
            dx.float().sum(1).to(shift.dtype) if of_shift else None,
            numbers[1].sum(0).to(weight.dtype) if of_weight else None,
            numbers[0].sum(0).to(weight.dtype) if of_bias else None,
            None, None, None, None,
        )  # fmt: skip


def group_norm(
    x_NSC: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, *, frames: int = 1,
    silu: bool = False,
    shift_NC: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Group normalisation of `x + shift` whose statistics span `frames` images, then SiLU if asked: `N S C`.

    Args:
        x_NSC: Images of S sites and C channels, contiguous; float32, float16 or bfloat16.
        groups: C is a multiple of it.
        weight: Of each channel, or none.
        bias: Of each channel, or none.
        eps: Added to the variance.
        frames: N is a multiple of it.
        silu: Whether SiLU follows.
        shift_NC: Added to every site of an image before, if given.
    """
    shift_NC = None if shift_NC is None else shift_NC.contiguous()
    return _GroupNorm.apply(x_NSC.contiguous(), shift_NC, weight, bias, groups, eps, frames, silu)  # pyright: ignore[reportReturnType]
