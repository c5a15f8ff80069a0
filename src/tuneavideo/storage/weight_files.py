"""Readers and writers of safetensors files and of PyTorch's `.bin`, `.pt`, `.pth` and `.ckpt`, one tensor at a time."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from tuneavideo.errors import CheckpointError
from tuneavideo.storage import atomic
from tuneavideo.storage.tensors import LazyTensor, Tensors, from_file, to_bytes

ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02"
SAFETENSORS_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32",
    torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
# Keys under which training programs keep the weights.
_WRAPPERS = ("state_dict", "model", "module", "unet")


def read_safetensors(path: Path) -> Tensors:
    """Read names, types and shapes. Raises CheckpointError when the file is cut short or damaged."""
    try:
        with safe_open(path, "pt") as file:
            mapped = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file ({str(error)[:200]}); copy it again") from None
    return {
        name: LazyTensor(tensor.dtype, tuple(tensor.shape), partial(_from_safetensors, path, name))
        for name, tensor in mapped.items()
    }


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the header, then one tensor after the other. Raises DiskError."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        kind = SAFETENSORS_TYPES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic.replacing(path) as draft, draft.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(to_bytes(tensor.read()))


def read_torch(path: Path) -> tuple[Tensors, list[str]]:
    """Read names, types and shapes with `weights_only=True`: the pickle can build tensors and nothing else.

    Files from before PyTorch 1.6, which are no archives, are loaded whole.

    Returns:
        The tensors by name, and the names of all other values.

    Raises:
        CheckpointError: The file is damaged, or its pickle needs more than tensors; no code in it was run.
    """
    is_archive = zipfile.is_zipfile(path)
    if is_archive:
        _refuse_compressed(path)
    try:
        # In this mode PyTorch records the offset of each tensor's bytes and does not read them.
        with FakeTensorMode() if is_archive else nullcontext():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from None
    except Exception as error:  # a damaged file raises nearly any type
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise CheckpointError(f"{path}: not a valid PyTorch file ({reason}); copy it again") from None
    found, others = _unwrapped(loaded)
    if not found:
        raise CheckpointError(f"{path} holds no named tensors; give the weights of a model")
    return {name: _from_torch(path, name, tensor.detach()) for name, tensor in found.items()}, others


def write_torch(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a dict for `torch.load`, one tensor after the other. Raises DiskError."""
    with FakeTensorMode():
        empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    with atomic.replacing(path) as draft, draft.open("wb") as file, skip_data(materialize_fake_tensors=True):
        archive = _Archive(file, tensors.values())
        try:
            torch.serialization._save(empty, archive, pickle, 2, False)
        finally:  # an archive without an end aborts the program when it is deleted
            archive.file.write_end_of_file()


class _Archive:
    """Archive for `torch.serialization._save` that reads each tensor when its bytes are written."""

    def __init__(self, file: BinaryIO, tensors: Iterable[LazyTensor]) -> None:
        self.file, self.tensors = torch._C.PyTorchFileWriter(file), iter(tensors)
        self.write_record = self.file.write_record

    def write_record_metadata(self, name: str, size: int) -> None:
        content: Any = torch.from_numpy(np.frombuffer(to_bytes(next(self.tensors).read()), np.uint8))
        self.write_record(name, content.untyped_storage(), size)


def _from_safetensors(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:  # opened anew, so that pages of other tensors do not stay in memory
        return file.get_tensor(name)


def _from_torch(path: Path, name: str, tensor: Tensor) -> LazyTensor:
    nbytes, offset = tensor.untyped_storage().nbytes(), _offset(tensor)
    if (
        tensor.layout != torch.strided
        or max(tensor.numel(), _extent(tensor)) * tensor.itemsize > nbytes
        or (offset or 0) + nbytes > path.stat().st_size
    ):
        raise CheckpointError(f"{path}: {name} has more elements than the file holds; it is damaged or malicious")
    if offset is None:
        return LazyTensor.of(tensor)
    count, view = nbytes // tensor.itemsize, (tensor.shape, tensor.stride(), tensor.storage_offset())
    pieces = [(offset, count * tensor.itemsize)]
    read = lambda: from_file(path, pieces, tensor.dtype, (count,)).as_strided(*view)  # noqa: E731
    return LazyTensor(tensor.dtype, tuple(tensor.shape), read)


def _offset(tensor: Tensor) -> int | None:
    """Return the offset in the file of a tensor loaded in the fake mode, None for one that is in memory."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _extent(tensor: Tensor) -> int:
    """Return how many elements of its storage a tensor reaches over."""
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset()) + sum((int(size) - 1) * int(step) for size, step in steps) + 1


def _refuse_compressed(path: Path) -> None:
    """Refuse what PyTorch never writes: compressed entries, which may expand to any size, and overlapping ones."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            stored = [each for each in entries if each.compress_type == zipfile.ZIP_STORED]
            orders = [each for each in stored if each.filename.endswith("/byteorder") and each.file_size < 16]
            order = [archive.read(each) for each in orders]
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not a valid PyTorch file ({error}); copy it again") from None
    if order not in ([], [b"little"]):
        raise CheckpointError(f"{path}: its numbers are big-endian; save it on a little-endian machine")
    if len(stored) < len(entries) or sum(each.file_size for each in entries) > path.stat().st_size:
        raise CheckpointError(f"{path}: its contents are compressed or overlap, which PyTorch never writes; refused")


def _refused(path: Path, error: Exception) -> CheckpointError:
    found = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
    return CheckpointError(
        f"{path} holds more than tensors, or is damaged; nothing of it was run ({found.strip()[:160] or 'no dict'}). "
        "If you trust its source, save the weights as .safetensors there and give that file"
    )


def _unwrapped(loaded: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors in nested training checkpoints, and the names of all other values."""
    if not isinstance(loaded, dict):
        return {}, []
    for wrapper in _WRAPPERS:
        if isinstance(loaded.get(wrapper), dict):
            found, others = _unwrapped(loaded[wrapper])
            return found, [*(str(name) for name in loaded if name != wrapper), *others]
    found = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return found, [str(name)[:200] for name in loaded if name not in found]
