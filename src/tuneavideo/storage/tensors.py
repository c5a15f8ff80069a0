"""Tensors larger than memory: read from a file when they are needed, or mapped to a file."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tuneavideo.errors import CheckpointError
from tuneavideo.storage import atomic


@dataclass(frozen=True)
class LazyTensor:
    """Type and shape of a tensor, and a function that reads it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def reshaped(self, *shape: int) -> LazyTensor:
        return LazyTensor(self.dtype, shape, lambda: self.read().reshape(shape))

    def rows(self, first: int, count: int) -> LazyTensor:
        """Return `count` rows from `first` on."""
        return LazyTensor(self.dtype, (count, *self.shape[1:]), lambda: self.read()[first : first + count].clone())

    def to(self, dtype: torch.dtype | None) -> LazyTensor:
        """Return the tensor in another floating-point type; integers and booleans stay as they are."""
        if dtype is None or not self.dtype.is_floating_point or dtype == self.dtype:
            return self
        return LazyTensor(dtype, self.shape, lambda: self.read().to(dtype))


Tensors = dict[str, LazyTensor]


def concatenated(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Join tensors along their first axis."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return LazyTensor(parts[0].dtype, shape, lambda: torch.cat([part.read() for part in parts]))


def to_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes, little-endian in C order; a contiguous CPU tensor is not copied."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(bytearray())


def from_file(path: Path, pieces: Sequence[tuple[int, int]], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Read the tensor whose bytes are `pieces` (offset, length) of a file. Raises CheckpointError if they end early."""
    buffer = bytearray(sum(length for _, length in pieces))
    view, position = memoryview(buffer), 0
    with path.open("rb") as file:
        for offset, length in pieces:
            file.seek(offset)
            if file.readinto(view[position : position + length]) != length:
                raise CheckpointError(f"{path}: the file became shorter while it was read; copy it again")
            position += length
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape) if buffer else torch.empty(shape, dtype=dtype)


def mapped(shape: Sequence[int], folder: Path) -> Tensor:
    """Make a float32 tensor that is mapped to an unnamed temporary file in `folder`. Raises DiskError."""
    with atomic.disk_errors(folder), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # on a full disk, a write to a mapped file would kill the process
            os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
        return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=tuple(shape)))
