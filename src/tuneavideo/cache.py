"""What needs computing only once, kept on disk under a key made of its contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tuneavideo import files
from tuneavideo.errors import DiskError

Tensors = dict[str, Tensor]
# Of every weight, about so many numbers tell one network from another: training and merging move all of them.
MARKS = 1024


def key(*parts: Any) -> str:
    """A short name for contents: arrays and tensors by their bytes, modules by `marks`, others as JSON."""
    digest = hashlib.sha256()
    for part in parts:
        items = marks(part) if isinstance(part, nn.Module) else [("", part)]
        for name, value in items:
            digest.update(name.encode() + b"\0" + _bytes(value))
    return digest.hexdigest()[:24]


def marks(network: nn.Module) -> list[tuple[str, Any]]:
    """The shape of every weight and `MARKS` of its numbers, evenly spaced: a second less than all of them take."""
    marked: list[tuple[str, Any]] = []
    for name, weight in sorted(network.state_dict().items()):
        numbers = weight.detach().reshape(-1)
        marked += [(name, list(weight.shape)), (name, numbers[:: max(1, len(numbers) // MARKS)])]
    return marked


def read(path: Path) -> Tensors | None:
    """Tensors kept in the safetensors file `path`; None when it is missing or not what `write` wrote, to the bit."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            digest = (file.metadata() or {}).get("digest")
    except (OSError, SafetensorError):
        return None
    return tensors if digest == _digest(tensors) else None


def write(path: Path, tensors: Tensors) -> None:
    """Keep tensors in `path`, whole or not at all. Raises DiskError when the disk takes nothing."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    files.write(path, save(tensors, metadata={"digest": _digest(tensors)}))


def cached(name: str, compute: Callable[[], Tensors]) -> Tensors:
    """What the cache folder keeps under `name`; computed when it is missing or damaged, and kept.

    A disk that takes nothing costs time later, not the result.
    """
    path = files.cache_folder() / f"{name}.safetensors"
    tensors = read(path)
    if tensors is None:
        tensors = compute()
        with suppress(DiskError):
            write(path, tensors)
    return tensors


def _digest(tensors: Tensors) -> str:
    return key(*(part for item in sorted(tensors.items()) for part in item))


def _bytes(part: Any) -> bytes:
    if isinstance(part, Tensor):
        flat = part.detach().cpu().contiguous().flatten()
        return f"{part.dtype}{tuple(part.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()
    if isinstance(part, np.ndarray):
        return f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes()
    return json.dumps(part, sort_keys=True, default=str).encode() + b"\0"
