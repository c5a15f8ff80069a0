"""A tensor that is read when it is asked for, so that a checkpoint larger than memory can pass through."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tuneavideo.errors import CheckpointError


@dataclass(frozen=True)
class Lazy:
    """What a tensor is, and how to get it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def reshaped(self, *shape: int) -> Lazy:
        return Lazy(self.dtype, shape, lambda: self.read().reshape(shape))

    def rows(self, first: int, count: int) -> Lazy:
        """`count` rows from `first` on."""
        return Lazy(self.dtype, (count, *self.shape[1:]), lambda: self.read()[first : first + count].clone())

    def to(self, dtype: torch.dtype | None) -> Lazy:
        """In another precision; numbers that are no floats stay what they are."""
        if dtype is None or not self.dtype.is_floating_point or dtype == self.dtype:
            return self
        return Lazy(dtype, self.shape, lambda: self.read().to(dtype))


Tensors = dict[str, Lazy]


def stacked(parts: Sequence[Lazy]) -> Lazy:
    """One below the other."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Lazy(parts[0].dtype, shape, lambda: torch.cat([part.read() for part in parts]))


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, little-endian and in C order, without a copy where it is so already."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def cut_out(path: Path, pieces: Sequence[tuple[int, int]], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor whose bytes lie in `pieces` of a file, each where it begins and how long it is."""
    buffer = bytearray(sum(length for _, length in pieces))
    view, at = memoryview(buffer), 0
    with path.open("rb") as file:
        for start, length in pieces:
            file.seek(start)
            if file.readinto(view[at : at + length]) != length:
                raise CheckpointError(f"{path}: became shorter while it was read; copy it again")
            at += length
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape) if buffer else torch.empty(shape, dtype=dtype)
