"""Reader and writer of MindSpore's `.ckpt` files; MindSpore itself is not needed.

A file is one protobuf message without header (`mindspore/train/checkpoint_pb2.py`):

    Checkpoint  { repeated Value value = 1 }
    Value       { required string tag = 1;  TensorProto tensor = 2  or  MapTensorProto maptensor = 3 }
    TensorProto { repeated int64 dims = 1;  required string tensor_type = 2;  required bytes tensor_content = 3 }

A trailer with a CRC-32 may follow. A tensor above `SLICE` bytes is split into values of the same tag, each with the
dims of the whole tensor.
"""

from __future__ import annotations

import math
import mmap
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch

from tuneavideo.errors import CheckpointError
from tuneavideo.storage import atomic
from tuneavideo.storage.tensors import LazyTensor, from_file, to_bytes

DTYPES = {
    "Int8": torch.int8, "UInt8": torch.uint8, "Int16": torch.int16, "UInt16": torch.uint16, "Int32": torch.int32,
    "UInt32": torch.uint32, "Int64": torch.int64, "UInt64": torch.uint64, "Float16": torch.float16,
    "Float32": torch.float32, "Float64": torch.float64, "Bool": torch.bool, "BFloat16": torch.bfloat16,
}  # fmt: skip
TEXT = "str"
SLICE = 512 * 2**20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SPELLINGS = {name.lower(): name for name in (*DTYPES, TEXT)}  # releases before 0.7 wrote "Uint8"
_ENCRYPTED = {struct.pack("<I", 0x7F3A5ED8 + mode) for mode in range(3)}
_CRC, _CRC_BYTES = b"crc_num", 17
# Longer names, more axes and larger texts mean that the file is damaged.
_MAX_NAME, _MAX_AXES, _MAX_TEXT = 4096, 16, 2**24


@dataclass(frozen=True)
class Entry:
    """A parameter in a file: `pieces` are offset and length of its bytes."""

    tag: str
    kind: str
    dims: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(length for _, length in self.pieces)

    @property
    def shape(self) -> tuple[int, ...]:
        """The dims; old releases wrote [0] for a scalar."""
        return () if self.dims == (0,) and self.nbytes else self.dims


def entries(path: Path) -> list[Entry]:
    """List the parameters of a file in its order; their contents are not read.

    Raises:
        CheckpointError: The file is encrypted, cut short, damaged or of another format.
    """
    with path.open("rb") as file:
        if file.read(4) in _ENCRYPTED:
            raise CheckpointError(f"{path} is encrypted; save it with MindSpore again, without enc_key")
        try:
            end = _checked_length(file)
            found: dict[str, Entry] = {}
            if end:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    _collect(data, end, found)
        except ValueError as error:
            raise CheckpointError(
                f"{path} is cut short, damaged or not a MindSpore checkpoint: {error}; copy it again"
            ) from None
    return list(found.values())


def read(path: Path) -> dict[str, LazyTensor | str]:
    """Read tensors and texts by name, in the file's order. Raises CheckpointError as `entries` does."""
    return {each.tag: _text(path, each) if each.kind == TEXT else _tensor(path, each) for each in entries(path)}


def write(path: Path, contents: Mapping[str, LazyTensor | str], *, crc: bool = False) -> None:
    """Write tensors and texts one after the other, with a CRC-32 if `crc`. Raises DiskError."""
    with atomic.replacing(path) as draft, draft.open("wb") as file:
        total = 0
        for message in _messages(contents):
            file.write(message)
            total = zlib.crc32(message, total) if crc else 0
        if crc:
            file.write(_CRC + total.to_bytes(10, "big"))


def header(tag: str, kind: str, dims: Iterable[int], length: int) -> bytes:
    """Encode a value up to its content of `length` bytes."""
    tensor = b"".join(b"\x08" + _varint(size) for size in dims)
    tensor += b"\x12" + _varint(len(kind)) + kind.encode() + b"\x1a" + _varint(length)
    name = tag.encode()
    value = b"\x0a" + _varint(len(name)) + name + b"\x12" + _varint(len(tensor) + length) + tensor
    return b"\x0a" + _varint(len(value) + length) + value


def _messages(contents: Mapping[str, LazyTensor | str]) -> Iterator[bytes | memoryview]:
    for name, value in contents.items():
        if isinstance(value, str):
            text = value.encode("utf-32-le")
            yield header(name, TEXT, (0,), len(text)) + text
            continue
        content = to_bytes(value.read())
        for start in range(0, len(content) or 1, SLICE):
            piece = content[start : start + SLICE]
            yield header(name, _NAMES[value.dtype], value.shape, len(piece))
            yield piece


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _checked_length(file: IO[bytes]) -> int:
    """Return the length without the trailer; raise ValueError if its checksum differs from the contents'."""
    length = file.seek(0, 2)
    end = max(0, length - _CRC_BYTES)
    file.seek(end)
    trailer = file.read()
    if not trailer.startswith(_CRC):
        return length
    file.seek(0)
    total, left = 0, end
    while left and (block := file.read(min(left, 2**24))):
        total, left = zlib.crc32(block, total), left - len(block)
    if total != int.from_bytes(trailer[len(_CRC) :], "big"):
        raise ValueError("its checksum does not match its contents")
    return end


def _collect(data: mmap.mmap, end: int, found: dict[str, Entry]) -> None:
    """Add the parameters to `found`; successive values of one tag are one parameter."""
    last = ""
    for number, value in _fields(data, 0, end):
        if number != 1 or not isinstance(value, slice):
            raise ValueError(f"unknown field {number}")
        entry = _entry(data, value)
        if entry.tag == last:
            entry = replace(found[last], pieces=found[last].pieces + entry.pieces)
        elif entry.tag in found:
            raise ValueError(f"{entry.tag!r} comes twice")
        found[entry.tag], last = entry, entry.tag
    for entry in found.values():
        item = 4 if entry.kind == TEXT else DTYPES[entry.kind].itemsize
        expected = entry.nbytes // 4 * 4 if entry.kind == TEXT else math.prod(entry.shape) * item
        if expected != entry.nbytes:
            raise ValueError(f"{entry.tag!r} of shape {entry.dims} needs {expected} bytes and has {entry.nbytes}")


def _entry(data: mmap.mmap, value: slice) -> Entry:
    tag, tensor = "", None
    for number, content in _fields(data, value.start, value.stop):
        if number == 1:
            tag = _name(data, content)
        elif number == 2 and isinstance(content, slice):
            tensor = content
        else:
            raise ValueError(f"{tag!r} is no tensor")
    if not tag or tensor is None:
        raise ValueError(f"a value without name or content before byte {value.stop}")
    dims, kind, pieces = [], "", ()
    for number, content in _fields(data, tensor.start, tensor.stop):
        if number == 1 and isinstance(content, int) and len(dims) < _MAX_AXES:
            dims.append(content)
        elif number == 2:
            kind = _name(data, content)
        elif number == 3 and isinstance(content, slice):
            pieces = ((content.start, content.stop - content.start),)
        else:
            raise ValueError(f"{tag!r} has the unknown field {number}")
    if kind.lower() not in _SPELLINGS:
        raise ValueError(f"{tag!r} has numbers of type {kind[:40]!r}, known are {', '.join(DTYPES)}")
    return Entry(tag, _SPELLINGS[kind.lower()], tuple(dims), pieces)


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each protobuf field: an int, or the slice of `data` that holds its bytes."""
    while position < end:
        key, position = _number(data, position, end)
        value, position = _number(data, position, end)
        if key & 7 == 2:
            if value > end - position:
                raise ValueError(f"expected {value} bytes at byte {position}, found {end - position}")
            value, position = slice(position, position + value), position + value
        elif key & 7 != 0:
            raise ValueError(f"unknown field type {key & 7} before byte {position}")
        yield key >> 3, value


def _number(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """Decode a varint; return it and the position behind it."""
    number = 0
    for shift in range(0, 64, 7):
        if position + shift // 7 >= end:
            break
        byte = data[position + shift // 7]
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position + shift // 7 + 1
    raise ValueError(f"no number ends at byte {position}")


def _name(data: mmap.mmap, content: Any) -> str:
    if not isinstance(content, slice) or content.stop - content.start > _MAX_NAME:
        raise ValueError("a name is missing or too long")
    return data[content].decode()


def _tensor(path: Path, entry: Entry) -> LazyTensor:
    dtype = DTYPES[entry.kind]
    return LazyTensor(dtype, entry.shape, lambda: from_file(path, entry.pieces, dtype, entry.shape))


def _text(path: Path, entry: Entry) -> str:
    if entry.nbytes > _MAX_TEXT:
        raise CheckpointError(f"{path} is damaged: a text of {entry.nbytes} bytes; copy it again")
    content = from_file(path, entry.pieces, torch.uint8, (entry.nbytes,))
    return bytes(to_bytes(content)).decode("utf-32-le", errors="replace").rstrip("\0")
