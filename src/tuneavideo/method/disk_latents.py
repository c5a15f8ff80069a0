"""Latents of long clips on disk: tensors of a safetensors file, read and written by frames."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

SHORT = "the file of latents is shorter than its header says"

Place = tuple[slice, slice, Sequence[int] | slice]


@dataclass(frozen=True)
class DiskLatents:
    """A float32 tensor `B C T H W` in a file. With B = 1, `latents[:, :, frames]` reads and writes those frames only.

    Attributes:
        file: Open, unbuffered.
        shape: `(B, C, T, H, W)`.
        offset: Where its bytes begin.
        device: Where frames are put that are read.
    """

    file: Any
    shape: tuple[int, ...]
    offset: int = 0
    device: torch.device | str = "cpu"

    dtype = torch.float32

    def __getitem__(self, place: Place) -> Tensor:
        _, channels, _, height, width = self.shape
        numbers = self._numbers(place)
        frames = np.empty((1, channels, len(numbers), height, width), np.float32)
        for at, image in self._images(numbers, frames):
            self.file.seek(at)
            if self.file.readinto(image.data.cast("B")) != image.nbytes:
                raise EOFError(SHORT)
        return torch.from_numpy(frames).to(self.device)

    def __setitem__(self, place: Place, latents: Tensor) -> None:
        for at, image in self._images(self._numbers(place), latents.detach().float().cpu().numpy()):
            self.file.seek(at)
            self.file.write(np.ascontiguousarray(image).data)

    def to(self, device: torch.device | str) -> DiskLatents:
        """The same latents, put on another device when they are read."""
        return replace(self, device=device)

    def pieces(self) -> Iterator[bytes]:
        """All its bytes in order."""
        self.file.seek(self.offset)
        left = 4 * math.prod(self.shape)
        while left:
            piece = self.file.read(min(left, 2**20))
            if not piece:
                raise EOFError(SHORT)
            left -= len(piece)
            yield piece

    def split(self, size: int) -> list[DiskLatents]:
        """Split into latents of one clip each; `size` is 1."""
        if size != 1:
            raise ValueError(f"latents on disk are read clip by clip, not {size} at a time")
        shape = (1, *self.shape[1:])
        return [
            replace(self, shape=shape, offset=self.offset + 4 * math.prod(shape) * at) for at in range(self.shape[0])
        ]

    def fill(self, other: DiskLatents) -> None:
        """Copy latents of the same shape."""
        at = self.offset
        for piece in other.pieces():
            self.file.seek(at)
            at += self.file.write(piece)

    def _numbers(self, place: Place) -> Sequence[int]:
        frames = place[2]
        return range(self.shape[2])[frames] if isinstance(frames, slice) else frames

    def _images(self, numbers: Sequence[int], frames: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Where each channel of each frame lies in the file, and in `frames`."""
        clips, channels, count, height, width = self.shape
        if clips != 1:
            raise ValueError(f"latents of {clips} clips must be split first")
        for channel in range(channels):
            for place, number in enumerate(numbers):
                yield self.offset + 4 * height * width * (channel * count + number), frames[0, channel, place]


def opened(path: Path) -> dict[str, DiskLatents] | None:
    """Open the latents of a complete safetensors file; None if it holds anything else."""
    file = path.open("rb", buffering=0)
    size = int.from_bytes(file.read(8), "little")
    header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    if any(each["dtype"] != "F32" or len(each["shape"]) != 5 for each in header.values()):
        return None
    return {
        name: DiskLatents(file, tuple(each["shape"]), 8 + size + each["data_offsets"][0])
        for name, each in header.items()
    }


def create(
    file: BinaryIO, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None
) -> dict[str, DiskLatents]:
    """Create a safetensors file of latents of these shapes, still to be written."""
    ends = np.cumsum([4 * math.prod(shape) for shape in shapes.values()]).tolist()
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    for (name, shape), begin, end in zip(shapes.items(), [0, *ends], ends, strict=False):
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    file.seek(0)
    file.write(len(told).to_bytes(8, "little") + told)
    file.truncate(8 + len(told) + ends[-1])
    return {
        name: DiskLatents(file, tuple(shape), 8 + len(told) + begin)
        for (name, shape), begin in zip(shapes.items(), [0, *ends], strict=False)
    }
