"""Group normalisation of clips in channels-last format, with a shift before and SiLU after it, in Triton.

Three kernels: moments of each channel in parts of an image; moments of each group of a clip, combined by the formula of
Chan et al. (1979); normalised values. All sums are in float32.
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

PROGRAMS = 512  # of the first kernel, about: a few per multiprocessor


@triton.jit
def _moments(
    x, shift, means, squares, HW, C, parts, size, SHIFTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Compute mean and sum of squared deviations of each channel in a part of an image."""
    image = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts) * size
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    last = tl.minimum(first + size, HW)
    x += image * HW * C
    pivot = tl.load(x + first.to(tl.int64) * C + c, mask=c < C, other=0.0).to(tl.float32)
    sums = tl.zeros((COLS,), tl.float32)
    squared = tl.zeros((COLS,), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < last) & (c[None, :] < C)
        at = x + rows[:, None].to(tl.int64) * C + c[None, :]
        deviation = tl.load(at, mask=inside, other=0.0).to(tl.float32) - pivot[None, :]
        deviation = tl.where(inside, deviation, 0.0)
        sums += tl.sum(deviation, 0)
        squared += tl.sum(deviation * deviation, 0)
    count = (last - first).to(tl.float32)
    mean = sums / count
    out = tl.program_id(0).to(tl.int64) * C + c
    tl.store(squares + out, tl.maximum(squared - sums * mean, 0.0), mask=c < C)
    mean += pivot
    if SHIFTED:
        mean += tl.load(shift + image * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(means + out, mean, mask=c < C)


@triton.jit
def _groups(means, squares, weight, bias, scales, offsets, group_means, rstds, HW, C, width, all_parts, parts,
            size, eps,
            AFFINE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Compute mean and reciprocal deviation of a clip's group, and scale and offset of its channels."""
    clip, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, COLS)
    c = group * width + column
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((), tl.float32)
    for start in range(0, all_parts, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < all_parts) & (column[None, :] < width)
        count = tl.minimum(HW - (rows % parts) * size, size).to(tl.float32)[:, None]
        at = (clip * all_parts + rows[:, None]) * C + c[None, :]
        mean = tl.load(means + at, mask=inside, other=0.0)
        sums += tl.sum(tl.where(inside, mean * count, 0.0))
        total += tl.sum(tl.where(inside, count + mean * 0, 0.0))
    group_mean = sums / total
    squared = tl.zeros((), tl.float32)
    for start in range(0, all_parts, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < all_parts) & (column[None, :] < width)
        count = tl.minimum(HW - (rows % parts) * size, size).to(tl.float32)[:, None]
        at = (clip * all_parts + rows[:, None]) * C + c[None, :]
        deviation = tl.load(means + at, mask=inside, other=0.0) - group_mean
        each = tl.load(squares + at, mask=inside, other=0.0)
        squared += tl.sum(tl.where(inside, each + deviation * deviation * count, 0.0))
    rstd = 1.0 / tl.sqrt(squared / total + eps)
    tl.store(group_means + clip * groups + group, group_mean)
    tl.store(rstds + clip * groups + group, rstd)
    scale = tl.zeros((COLS,), tl.float32) + rstd
    offset = -group_mean * scale
    if AFFINE:
        w = tl.load(weight + c, mask=column < width, other=0.0).to(tl.float32)
        scale = scale * w
        offset = tl.load(bias + c, mask=column < width, other=0.0).to(tl.float32) - group_mean * scale
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
def _statistics(shift, scales, offsets, group_means, rstds, image, clip, c, C, width, groups, SHIFTED: tl.constexpr):
    """Return scale and offset of channels, and mean and reciprocal deviation of their groups, for unshifted input."""
    scale = tl.load(scales + clip * C + c, mask=c < C, other=0.0)
    offset = tl.load(offsets + clip * C + c, mask=c < C, other=0.0)
    mean = tl.load(group_means + clip * groups + c // width, mask=c < C, other=0.0)
    rstd = tl.load(rstds + clip * groups + c // width, mask=c < C, other=0.0)
    if SHIFTED:
        more = tl.load(shift + image * C + c, mask=c < C, other=0.0).to(tl.float32)
        offset += scale * more
        mean -= more
    return scale, offset, mean, rstd


@triton.jit
def _before_activation(x, dy, at, inside, scale, offset, mean, rstd, SILU: tl.constexpr):
    """Return the gradient before the activation, and the normalised input."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = value * scale[None, :] + offset[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        d = d * sigmoid * (1.0 + z * (1.0 - sigmoid))
    return d, (value - mean[None, :]) * rstd[None, :]


@triton.jit
def _gradient_sums(x, dy, shift, scales, offsets, group_means, rstds, sums, products, HW, C, width, groups, frames,
                   parts, size, SHIFTED: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr,
                   COLS: tl.constexpr):  # fmt: skip
    """Sum, of each channel in a part, the gradient before the activation, and it times the normalised input."""
    image = (tl.program_id(0) // parts).to(tl.int64)
    first = (tl.program_id(0) % parts) * size
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    last = tl.minimum(first + size, HW)
    scale, offset, mean, rstd = _statistics(
        shift, scales, offsets, group_means, rstds, image, image // frames, c, C, width, groups, SHIFTED
    )
    s = tl.zeros((COLS,), tl.float32)
    p = tl.zeros((COLS,), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < last) & (c[None, :] < C)
        at = image * HW * C + rows[:, None].to(tl.int64) * C + c[None, :]
        d, normalised = _before_activation(x, dy, at, inside, scale, offset, mean, rstd, SILU)
        s += tl.sum(d, 0)
        p += tl.sum(d * normalised, 0)
    out = tl.program_id(0).to(tl.int64) * C + c
    tl.store(sums + out, s, mask=c < C)
    tl.store(products + out, p, mask=c < C)


@triton.jit
def _gradient_groups(sums, products, weight, first, second, C, width, all_parts, count, AFFINE: tl.constexpr,
                     ROWS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """Compute the weighted means of the gradient, and of it times the normalised input, of a clip's group."""
    clip, group, groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    column = tl.arange(0, COLS)
    c = group * width + column
    w = tl.zeros((COLS,), tl.float32) + 1.0
    if AFFINE:
        w = tl.load(weight + c, mask=column < width, other=0.0).to(tl.float32)
    a = tl.zeros((COLS,), tl.float32)
    b = tl.zeros((COLS,), tl.float32)
    for start in range(0, all_parts, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < all_parts) & (column[None, :] < width)
        at = (clip * all_parts + rows[:, None]) * C + c[None, :]
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
    scale, offset, mean, rstd = _statistics(
        shift, scales, offsets, group_means, rstds, image, clip, c, C, width, groups, SHIFTED
    )
    a = tl.load(first + clip * groups + c // width, mask=c < C, other=0.0)
    b = tl.load(second + clip * groups + c // width, mask=c < C, other=0.0)
    inside = (rows[:, None] < HW) & (c[None, :] < C)
    at = image * HW * C + rows[:, None].to(tl.int64) * C + c[None, :]
    d, normalised = _before_activation(x, dy, at, inside, scale, offset, mean, rstd, SILU)
    gradient = d * scale[None, :] - rstd[None, :] * (a[None, :] + normalised * b[None, :])
    tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)


def _tiling(x_NSC: Tensor) -> tuple[int, int, int, int]:
    """Return columns and rows of a tile, rows of a part of an image, and the number of parts."""
    images, sites, channels = x_NSC.shape
    cols = min(64, triton.next_power_of_2(channels))
    rows = min(64, triton.next_power_of_2(sites))
    parts = max(1, PROGRAMS // (images * triton.cdiv(channels, cols)))
    size = max(rows, triton.next_power_of_2(triton.cdiv(sites, parts)))
    return cols, rows, size, triton.cdiv(sites, size)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Any, weight: Any, bias: Any, groups: int, eps: float, frames: int, silu: bool
    ) -> Tensor:
        images, sites, channels = x.shape
        clips, width = images // frames, channels // groups
        cols, rows, size, parts = _tiling(x)
        affine, shifted = weight is not None, shift is not None
        numbers = x.new_empty(2, images * parts, channels, dtype=torch.float32)
        per_channel = x.new_empty(2, clips, channels, dtype=torch.float32)
        per_group = x.new_empty(2, clips, groups, dtype=torch.float32)
        y = torch.empty_like(x)
        blocks = triton.cdiv(channels, cols)
        with torch.cuda.device_of(x):
            _moments[(images * parts, blocks)](
                x, shift, numbers[0], numbers[1], sites, channels, parts, size, SHIFTED=shifted, ROWS=rows, COLS=cols
            )
            _groups[(clips, groups)](
                numbers[0], numbers[1], weight, bias, per_channel[0], per_channel[1], per_group[0], per_group[1],
                sites, channels, width, frames * parts, parts, size, eps,
                AFFINE=affine, ROWS=64, COLS=triton.next_power_of_2(width),
            )  # fmt: skip
            tiles = triton.cdiv(sites, rows)
            _normalise[(images * tiles, blocks)](
                x, shift, per_channel[0], per_channel[1], y, sites, channels, frames, tiles,
                SHIFTED=shifted, SILU=silu, ROWS=rows, COLS=cols,
            )  # fmt: skip
        ctx.save_for_backward(x, shift, weight, per_channel, per_group)
        ctx.options = groups, frames, silu
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, shift, weight, per_channel, per_group), (groups, frames, silu) = ctx.saved_tensors, ctx.options
        dy = gradients[0].contiguous()
        images, sites, channels = x.shape
        clips, width = images // frames, channels // groups
        cols, rows, size, parts = _tiling(x)
        affine, shifted = weight is not None, shift is not None
        numbers = x.new_empty(2, images * parts, channels, dtype=torch.float32)
        means = x.new_empty(2, clips, groups, dtype=torch.float32)
        dx = torch.empty_like(x)
        blocks, tiles = triton.cdiv(channels, cols), triton.cdiv(sites, rows)
        with torch.cuda.device_of(x):
            _gradient_sums[(images * parts, blocks)](
                x, dy, shift, per_channel[0], per_channel[1], per_group[0], per_group[1], numbers[0], numbers[1],
                sites, channels, width, groups, frames, parts, size,
                SHIFTED=shifted, SILU=silu, ROWS=rows, COLS=cols,
            )  # fmt: skip
            _gradient_groups[(clips, groups)](
                numbers[0], numbers[1], weight, means[0], means[1], channels, width, frames * parts,
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
    """Normalise groups of channels of `x + shift` over all images of a clip: `N S C`.

    Args:
        x_NSC: Images of S sites and C channels; float32, float16 or bfloat16.
        groups: Number of groups, of which C is a multiple.
        weight: Factor of each channel, or None.
        bias: Bias of each channel, or None.
        eps: Added to the variance.
        frames: Images per clip.
        silu: Whether SiLU follows.
        shift_NC: Added to all sites of an image beforehand, or None.
    """
    shift_NC = None if shift_NC is None else shift_NC.contiguous()
    return _GroupNorm.apply(x_NSC.contiguous(), shift_NC, weight, bias, groups, eps, frames, silu)  # pyright: ignore[reportReturnType]
