"""What needs computing only once, kept on disk under a key made of its contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tuneavideo.errors import DiskError
from tuneavideo.method.reels import Reel, create, opened
from tuneavideo.storage import atomic

Tensors = dict[str, Tensor]
DIGITS = 24
# Of every weight, about so many numbers tell one network from another: training and merging move all of them.
MARKS = 1024


def key(*parts: Any) -> str:
    """A short name for contents: arrays and tensors by their bytes, modules by `marks`, others as JSON."""
    digest = hashlib.sha256()
    for part in parts:
        items = marks(part) if isinstance(part, nn.Module) else [("", part)]
        for name, value in items:
            digest.update(name.encode() + b"\0")
            for piece in _pieces(value):
                digest.update(piece)
    return digest.hexdigest()[:DIGITS]


def marks(network: nn.Module) -> list[tuple[str, Any]]:
    """The shape of every weight and `MARKS` of its numbers, evenly spaced: a second less than all of them take."""
    marked: list[tuple[str, Any]] = []
    for name, weight in sorted(network.state_dict().items()):
        numbers = weight.detach().reshape(-1)
        marked += [(name, list(weight.shape)), (name, numbers[:: max(1, len(numbers) // MARKS)])]
    return marked


def read(path: Path, *, by_frames: bool = False) -> dict[str, Any] | None:
    """Tensors kept in the safetensors file `path`; None when it is missing or not what `write` wrote, to the bit.

    By frames they stay there, as reels.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = opened(path) if by_frames else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = (file.metadata() or {}).get("digest")
    except (OSError, SafetensorError):
        return None
    return tensors if tensors and digest == checksum(tensors) else None


def write(path: Path, tensors: Mapping[str, Tensor | Reel]) -> None:
    """Keep tensors in `path`, whole or not at all. Raises DiskError when the disk takes nothing."""
    reels = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Reel)}
    if reels:
        with writing(path, {name: reel.shape for name, reel in reels.items()}) as made:
            for name, reel in reels.items():
                made[name].fill(reel)
        return
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    atomic.write(path, save(here, metadata={"digest": checksum(here)}))


@contextmanager
def writing(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Generator[dict[str, Reel], None, None]:
    """Latents to be filled in on the disk; they become `path` when the block ends well, which `read` takes too."""
    with atomic.replacing(path) as draft, draft.open("w+b", buffering=0) as file:
        blank = create(file, shapes, {"digest": "-" * DIGITS})
        yield blank
        create(file, shapes, {"digest": checksum(blank)})


def cached(name: str, compute: Callable[[], Tensors]) -> Tensors:
    """What the cache folder keeps under `name`; computed when it is missing or damaged, and kept.

    A disk that takes nothing costs time later, not the result.
    """
    path = atomic.cache_folder() / f"{name}.safetensors"
    tensors = read(path)
    if tensors is None:
        tensors = compute()
        with suppress(DiskError):
            write(path, tensors)
    return tensors


def checksum(tensors: Mapping[str, Tensor | Reel]) -> str:
    """A digest of tensors with their names, types and shapes."""
    return key(*(part for item in sorted(tensors.items()) for part in item))


def _pieces(part: Any) -> Iterator[bytes]:
    if isinstance(part, Tensor | Reel):
        yield f"{part.dtype}{tuple(part.shape)}".encode()
        yield from part.pieces() if isinstance(part, Reel) else [_bytes(part)]
    elif isinstance(part, np.ndarray):
        yield f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes()
    else:
        yield json.dumps(part, sort_keys=True, default=str).encode() + b"\0"


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
