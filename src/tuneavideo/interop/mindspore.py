"""Bytes: MindSpore's .ckpt, without MindSpore.

A file is a row of protobuf messages without header (`mindspore/train/checkpoint_pb2.py`), here called entries:

    Checkpoint  { repeated Value value = 1 }
    Value       { required string tag = 1;  TensorProto tensor = 2  or  MapTensorProto maptensor = 3 }
    TensorProto { repeated int64 dims = 1;  required string tensor_type = 2;  required bytes tensor_content = 3 }

and perhaps a trailer with a CRC32. A tensor above `SLICE` bytes is cut into entries of the same tag, all with the
whole dims.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from tuneavideo.errors import CheckpointError
from tuneavideo.interop.lazy import Lazy, cut_out, raw
from tuneavideo.storage import atomic

DTYPES = {
    "Int8": torch.int8,
    "UInt8": torch.uint8,
    "Int16": torch.int16,
    "UInt16": torch.uint16,
    "Int32": torch.int32,
    "UInt32": torch.uint32,
    "Int64": torch.int64,
    "UInt64": torch.uint64,
    "Float16": torch.float16,
    "Float32": torch.float32,
    "Float64": torch.float64,
    "Bool": torch.bool,
    "BFloat16": torch.bfloat16,
}
TEXT = "str"
SLICE = 512 * 2**20
_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
_SPELLED = {kind.lower(): kind for kind in (*DTYPES, TEXT)}  # releases before 0.7 wrote "Uint8"
_ENCRYPTED = {struct.pack("<I", 0x7F3A5ED8 + mode) for mode in range(3)}
_CRC, _CRC_BYTES = b"crc_num", 17
# No name is longer and no tensor has more axes; what says so is damaged.
_LONGEST, _AXES, _BLOCK = 4096, 16, 2**24


@dataclass(frozen=True)
class Entry:
    """A parameter as it stands in a file: `pieces` are (begin, length) of its bytes."""

    tag: str
    kind: str
    dims: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(length for _, length in self.pieces)

    @property
    def shape(self) -> tuple[int, ...]:
        """Old releases wrote a scalar's dims as [0]."""
        return () if self.dims == (0,) and self.nbytes else self.dims


def entries(path: Path) -> list[Entry]:
    """What a file holds, in its order; contents are left where they are.

    Raises:
        CheckpointError: It is encrypted, cut short, damaged or no such file.
    """
    with path.open("rb") as file:
        if file.read(4) in _ENCRYPTED:
            raise CheckpointError(f"{path} is encrypted; save it with MindSpore again, without enc_key")
        file.seek(0)
        end = _without_trailer(file, path)
        found: dict[str, Entry] = {}
        last = ""
        for entry in _parsed(file, path, end):
            if entry.tag == last:
                found[last] = replace(found[last], pieces=found[last].pieces + entry.pieces)
            elif entry.tag in found:
                raise _damaged(path, f"{entry.tag!r} comes twice")
            else:
                found[entry.tag] = entry
            last = entry.tag
    for entry in found.values():
        _check(path, entry)
    return list(found.values())


def read(path: Path) -> dict[str, Lazy | str]:
    """Tensors and texts by name, in the file's order."""
    return {each.tag: _text(path, each) if each.kind == TEXT else _lazy(path, each) for each in entries(path)}


def write(path: Path, contents: Mapping[str, Lazy | str], *, crc: bool = False) -> None:
    """Write tensors and texts one after the other; `crc` adds the trailer. Raises DiskError."""
    with atomic.replacing(path) as draft, draft.open("wb") as file:
        total = 0
        for message in _messages(contents):
            file.write(message)
            total = zlib.crc32(message, total) if crc else 0
        if crc:
            file.write(_CRC + total.to_bytes(10, "big"))


def _messages(contents: Mapping[str, Lazy | str]) -> Iterator[bytes | memoryview]:
    for name, value in contents.items():
        if isinstance(value, str):
            text = value.encode("utf-32-le")
            yield _head(name, TEXT, (0,), len(text)) + text
            continue
        content = raw(value.read())
        for at in range(0, len(content) or 1, SLICE):
            piece = content[at : at + SLICE]
            yield _head(name, _KINDS[value.dtype], value.shape, len(piece))
            yield piece


def _head(tag: str, kind: str, dims: Iterable[int], length: int) -> bytes:
    """An entry up to its content."""
    tensor = b"".join(b"\x08" + _varint(size) for size in dims)
    tensor += b"\x12" + _varint(len(kind)) + kind.encode() + b"\x1a" + _varint(length)
    name = tag.encode()
    value = b"\x0a" + _varint(len(name)) + name + b"\x12" + _varint(len(tensor) + length) + tensor
    return b"\x0a" + _varint(len(value) + length) + value


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _without_trailer(file: IO[bytes], path: Path) -> int:
    """Where the entries end; checks the trailer, if there is one."""
    size = path.stat().st_size
    if size < _CRC_BYTES:
        return size
    file.seek(size - _CRC_BYTES)
    trailer = file.read(_CRC_BYTES)
    if not trailer.startswith(_CRC):
        return size
    file.seek(0)
    total, left = 0, size - _CRC_BYTES
    while left and (block := file.read(min(left, _BLOCK))):
        total, left = zlib.crc32(block, total), left - len(block)
    if total != int.from_bytes(trailer[len(_CRC) :], "big"):
        raise _damaged(path, "its checksum is another one")
    return size - _CRC_BYTES


def _parsed(file: IO[bytes], path: Path, end: int) -> Iterator[Entry]:
    cursor = _Cursor(file, path, 0, end)
    while cursor.at < end:
        if cursor.key() != 0x0A:
            raise _damaged(path, f"no entry begins at byte {cursor.at}")
        yield _entry(cursor.inside())


def _entry(value: _Cursor) -> Entry:
    tag, entry = "", None
    while value.at < value.end:
        match value.key():
            case 0x0A:
                tag = value.text()
            case 0x12:
                entry = _tensor(value.inside())
            case 0x1A:
                raise CheckpointError(f"{value.path}: {tag!r} is a hash table; no Stable Diffusion has one")
            case _:
                raise _damaged(value.path, f"an unknown field before byte {value.at}")
    if not tag or entry is None:
        raise _damaged(value.path, f"an entry without name or content before byte {value.at}")
    return replace(entry, tag=tag)


def _tensor(fields: _Cursor) -> Entry:
    dims, kind, pieces = [], "", ()
    while fields.at < fields.end:
        match fields.key():
            case 0x08 if len(dims) < _AXES:
                dims.append(fields.varint())
            case 0x12:
                kind = fields.text()
            case 0x1A:
                content = fields.inside()
                pieces = ((content.at, content.end - content.at),)
                content.skip()
            case _:
                raise _damaged(fields.path, f"an unknown field before byte {fields.at}")
    if kind.lower() not in _SPELLED:
        raise CheckpointError(f"{fields.path}: numbers of type {kind[:40]!r}; known are {', '.join(DTYPES)}")
    return Entry("", _SPELLED[kind.lower()], tuple(dims), pieces)


@dataclass
class _Cursor:
    """A place in a file, and the end of the message around it. The file is read from front to back only."""

    file: IO[bytes]
    path: Path
    at: int
    end: int

    def __post_init__(self) -> None:
        self.file.seek(self.at)

    def key(self) -> int:
        return self.varint()

    def varint(self) -> int:
        number = 0
        for shift in range(0, 64, 7):
            byte = self._take(1)[0]
            number |= (byte & 127) << shift
            if byte < 128:
                return number
        raise _damaged(self.path, f"no number ends before byte {self.at}")

    def text(self) -> str:
        length = self.varint()
        if length > _LONGEST:
            raise _damaged(self.path, f"a name of {length} bytes at byte {self.at}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise _damaged(self.path, f"a name that is no text before byte {self.at}") from None

    def inside(self) -> _Cursor:
        """The message that begins here; this cursor goes on behind it."""
        length = self.varint()
        if length > self.end - self.at:
            raise CheckpointError(
                f"{self.path} is cut short or damaged: what begins at byte {self.at} should have {length} bytes, "
                f"{self.end - self.at} are there; copy it again"
            )
        begin, self.at = self.at, self.at + length
        return _Cursor(self.file, self.path, begin, self.at)

    def skip(self) -> None:
        self.file.seek(self.end)

    def _take(self, count: int) -> bytes:
        if count > self.end - self.at:
            raise CheckpointError(f"{self.path} is cut short or damaged at byte {self.at}; copy it again")
        self.at += count
        return self.file.read(count)


def _check(path: Path, entry: Entry) -> None:
    item = 4 if entry.kind == TEXT else DTYPES[entry.kind].itemsize
    expected = entry.nbytes // item * item if entry.kind == TEXT else math.prod(entry.shape) * item
    if expected != entry.nbytes:
        raise _damaged(path, f"{entry.tag!r} of shape {entry.dims} should have {expected} bytes and has {entry.nbytes}")


def _lazy(path: Path, entry: Entry) -> Lazy:
    dtype = DTYPES[entry.kind]
    return Lazy(dtype, entry.shape, lambda: cut_out(path, entry.pieces, dtype, entry.shape))


def _text(path: Path, entry: Entry) -> str:
    if entry.nbytes > _BLOCK:
        raise _damaged(path, f"a text of {entry.nbytes} bytes")
    content = cut_out(path, entry.pieces, torch.uint8, (entry.nbytes,))
    return bytes(raw(content)).decode("utf-32-le", errors="replace").rstrip("\0")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged, or no MindSpore checkpoint: {what}; copy it again")
