"""Bytes: PyTorch's own files (.bin, .pt, .pth, and .ckpt of the first Stable Diffusion).

They are programs that build tensors. Read with `weights_only=True`: PyTorch runs nothing but the building of tensors.
Written without pickling anything but names, shapes and places, so that the tensors pass one by one.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._utils import _rebuild_tensor_v2

from tuneavideo.errors import CheckpointError
from tuneavideo.interop.lazy import Lazy, Tensors, cut_out, raw
from tuneavideo.storage import atomic

ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02"
_ALIGNED = 64
_WRAPPERS = ("state_dict", "model", "module", "unet")


def read(path: Path) -> tuple[Tensors, list[str]]:
    """Tensors by name, and the names of what is no tensor.

    Raises:
        CheckpointError: It is damaged, or wants more than tensors; nothing of it was run.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _refuse_packed(path)
    try:
        # Within the fake mode PyTorch notes where a tensor's numbers lie, and leaves them there.
        with FakeTensorMode() if zipped else nullcontext():
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from None
    except Exception as error:  # of a damaged file it raises nearly everything
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise CheckpointError(f"{path}: no sound PyTorch file ({told}); copy it again") from None
    found, others = _flat(loaded)
    if not found:
        raise CheckpointError(f"{path} holds no named tensors; give the weights of a model")
    return {name: _lazy(path, name, tensor.detach()) for name, tensor in found.items()}, others


def _lazy(path: Path, name: str, tensor: Tensor) -> Lazy:
    storage = tensor.untyped_storage()
    begin: int | None = getattr(storage, "_checkpoint_offset", None)
    if (
        tensor.layout != torch.strided
        or max(tensor.numel(), _reach(tensor)) * tensor.itemsize > storage.nbytes()
        or (begin or 0) + storage.nbytes() > path.stat().st_size
    ):
        raise CheckpointError(f"{path}: {name} claims more numbers than the file has; it is damaged or malicious")
    if begin is None:
        return Lazy.of(tensor)
    count, view = storage.nbytes() // tensor.itemsize, (tensor.shape, tensor.stride(), tensor.storage_offset())
    pieces = [(begin, count * tensor.itemsize)]
    read = lambda: cut_out(path, pieces, tensor.dtype, (count,)).as_strided(*view)  # noqa: E731
    return Lazy(tensor.dtype, tuple(tensor.shape), read)


def _reach(tensor: Tensor) -> int:
    """One more than the place of the last number that a tensor shows of its storage."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (
        int(tensor.storage_offset()) + sum((int(size) - 1) * int(step) for size, step in steps) + 1
        if tensor.numel()
        else 0
    )


def write(path: Path, tensors: Mapping[str, Lazy]) -> None:
    """Write what `torch.load` reads as a dict, tensor by tensor. Raises DiskError."""
    with atomic.replacing(path) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, "data.pkl", _program(tensors))
        _add(archive, "byteorder", b"little")
        for number, tensor in enumerate(tensors.values()):
            _add(archive, f"data/{number}", raw(tensor.read()))
        _add(archive, "version", b"3\n")


def _refuse_packed(path: Path) -> None:
    """PyTorch packs nothing; what is packed may unfold to any size."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [each for each in archive.infolist() if each.compress_type != zipfile.ZIP_STORED]
            order = [archive.read(each) for each in archive.infolist() if _tells_order(each)]
            total = sum(each.file_size for each in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: no sound PyTorch file ({error}); copy it again") from None
    if order not in ([], [b"little"]):
        raise CheckpointError(f"{path}: its numbers are written big end first; save it on a usual machine")
    if packed or total > path.stat().st_size:
        raise CheckpointError(f"{path}: its contents are packed or overlap, which PyTorch never does; not opened")


def _tells_order(entry: zipfile.ZipInfo) -> bool:
    small = entry.compress_type == zipfile.ZIP_STORED and entry.file_size < 16
    return small and entry.filename.endswith("/byteorder")


def _refused(path: Path, error: Exception) -> CheckpointError:
    wanted = next((line for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line), "")
    return CheckpointError(
        f"{path} is not only tensors, or damaged; nothing of it was run ({wanted.strip()[:160] or 'no tensors'}). "
        "If you trust where it comes from, save its weights as .safetensors there and give that"
    )


def _flat(loaded: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Out of the dict that training programs put around weights."""
    if not isinstance(loaded, dict):
        return {}, []
    for wrapper in _WRAPPERS:
        if isinstance(loaded.get(wrapper), dict):
            others = [str(name) for name in loaded if name != wrapper]
            found, more = _flat(loaded[wrapper])
            return found, others + more
    found = {name: value for name, value in loaded.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return found, [str(name)[:200] for name in loaded if name not in found]


class _Storage:
    """Where a tensor's numbers lie in the archive."""

    def __init__(self, key: str, tensor: Lazy) -> None:
        kind = torch.storage._dtype_to_storage_type_map()[tensor.dtype]
        self.told = ("storage", getattr(torch, kind), key, "cpu", tensor.nbytes // tensor.dtype.itemsize)


class _Planned:
    """A tensor whose numbers are written later."""

    def __init__(self, key: str, tensor: Lazy) -> None:
        self.storage, self.shape = _Storage(key, tensor), tensor.shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(accumulate(self.shape[:0:-1], lambda a, b: a * b, initial=1))[::-1] if self.shape else ()
        return _rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.told if isinstance(obj, _Storage) else None


def _program(tensors: Mapping[str, Lazy]) -> bytes:
    out = io.BytesIO()
    planned = OrderedDict((name, _Planned(str(n), tensor)) for n, (name, tensor) in enumerate(tensors.items()))
    _Pickler(out, protocol=2).dump(planned)
    return out.getvalue()


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """An entry whose content begins at a multiple of 64 bytes, as PyTorch writes it, so that it can be mapped."""
    info = zipfile.ZipInfo(f"archive/{name}")
    assert archive.fp
    padding = -(archive.fp.tell() + 30 + len(info.filename) + 4) % _ALIGNED
    info.extra = b"FB" + struct.pack("<H", padding) + b"\0" * padding
    info.file_size = len(content)
    with archive.open(info, "w") as entry:
        entry.write(content)
