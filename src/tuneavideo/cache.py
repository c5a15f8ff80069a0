"""What needs computing only once, kept on disk under a key made of its contents."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]


def folder() -> Path:
    """`$TUNEAVIDEO_CACHE`, or `tuneavideo` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TUNEAVIDEO_CACHE") or Path(home) / "tuneavideo")


def key(*parts: Any) -> str:
    """A short name for contents: arrays and tensors by their bytes, modules by their weights, others as JSON."""
    digest = hashlib.sha256()
    for part in parts:
        items = sorted(part.state_dict().items()) if isinstance(part, nn.Module) else [("", part)]
        for name, value in items:
            digest.update(name.encode() + b"\0" + _bytes(value))
    return digest.hexdigest()[:24]


def read(path: Path) -> Tensors | None:
    """Tensors kept in the safetensors file `path`; None when it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def write(path: Path, tensors: Tensors) -> None:
    """Keep tensors in `path`, whole or not at all. A disk that takes nothing costs time later, not the result."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)


def cached(path: Path, compute: Callable[[], Tensors]) -> Tensors:
    """What `path` keeps; computed and kept when it is missing or damaged."""
    tensors = read(path)
    if tensors is None:
        tensors = compute()
        write(path, tensors)
    return tensors


def _bytes(part: Any) -> bytes:
    if isinstance(part, Tensor):
        flat = part.detach().cpu().contiguous().flatten()
        return f"{part.dtype}{tuple(part.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes()
    if isinstance(part, np.ndarray):
        return f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes()
    return json.dumps(part, sort_keys=True, default=str).encode() + b"\0"
