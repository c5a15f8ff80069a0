"""Cache of tensors on disk, under keys made of the contents they were computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tuneavideo.errors import DiskError
from tuneavideo.storage import atomic
from tuneavideo.storage.tensors import LazyTensor, to_bytes
from tuneavideo.storage.weight_files import write_safetensors

Tensors = dict[str, Tensor]
DIGITS = 24
# Numbers of each weight in a key; training and merging change all of them.
SAMPLES = 1024


def key(*parts: Any) -> str:
    """Return a hash of contents: arrays and tensors by their bytes, modules by `weight_samples`, others as JSON."""
    digest = hashlib.sha256()
    for part in parts:
        items = weight_samples(part) if isinstance(part, nn.Module) else [("", part)]
        for name, value in items:
            digest.update(name.encode() + b"\0")
            for piece in _pieces(value):
                digest.update(piece)
    return digest.hexdigest()[:DIGITS]


def weight_samples(network: nn.Module) -> list[tuple[str, Any]]:
    """Return the shape of every weight and `SAMPLES` of its numbers, evenly spaced; faster than hashing all of them."""
    samples: list[tuple[str, Any]] = []
    for name, weight in sorted(network.state_dict().items()):
        numbers = weight.detach().reshape(-1)
        samples += [(name, list(weight.shape)), (name, numbers[:: max(1, len(numbers) // SAMPLES)])]
    return samples


def read(path: Path) -> Tensors | None:
    """Read the safetensors file `path`, mapped into memory; None when it is missing or its checksum is wrong."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = (file.metadata() or {}).get("digest")
    except (OSError, SafetensorError):
        return None
    return tensors if tensors and digest == checksum(tensors) else None


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to `path` atomically. Raises DiskError when that fails."""
    lazy = {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
    write_safetensors(path, lazy, {"digest": checksum(tensors)})


def cached(name: str, compute: Callable[[], Tensors]) -> Tensors:
    """Read `name` from the cache folder, or compute and keep it when it is missing or damaged.

    A full disk is no error.
    """
    path = atomic.cache_folder() / f"{name}.safetensors"
    tensors = read(path)
    if tensors is None:
        tensors = compute()
        with suppress(DiskError):
            write(path, tensors)
    return tensors


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of tensors with their names, types and shapes."""
    return key(*(part for item in sorted(tensors.items()) for part in item))


def _pieces(part: Any) -> Iterator[bytes | memoryview]:
    if isinstance(part, Tensor):
        yield f"{part.dtype}{tuple(part.shape)}".encode()
        yield to_bytes(part)
    elif isinstance(part, np.ndarray):
        yield f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes()
    else:
        yield json.dumps(part, sort_keys=True, default=str).encode() + b"\0"
