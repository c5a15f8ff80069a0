"""Bytes: safetensors, read and written tensor by tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from tuneavideo.errors import CheckpointError
from tuneavideo.interop.lazy import Lazy, Tensors, cut_out, raw
from tuneavideo.storage import atomic

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors by name, and the file's metadata. Raises CheckpointError when it is cut short or damaged."""
    try:
        with safe_open(path, "pt"):  # checks that the header is sound and the file as long as it says
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no sound safetensors file ({str(error)[:200]}); copy it again") from None
    metadata = header.pop("__metadata__", {})
    return {name: _lazy(path, name, entry, 8 + length) for name, entry in header.items()}, metadata


def write(path: Path, tensors: Mapping[str, Lazy], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors one after the other, the header first. Raises DiskError."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, tensor in tensors.items():
        kind, begin, end = _NAMES[tensor.dtype], end, end + tensor.nbytes
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic.replacing(path) as draft, draft.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(raw(tensor.read()))


def _lazy(path: Path, name: str, entry: dict, data: int) -> Lazy:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{path}: {name} has numbers of type {entry['dtype']}; known are {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    return Lazy(dtype, shape, lambda: cut_out(path, [(data + begin, end - begin)], dtype, shape))
