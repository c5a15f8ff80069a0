"""Files appear whole or not at all: written under another name, forced to the disk, renamed. Nobody else does it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from tuneavideo.errors import DiskError

PART = ".part"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write(path: Path, contents: bytes | str) -> None:
    """Write a file, and its folder if need be. Raises DiskError when the place cannot be written or is full."""
    with replacing(path) as draft:
        draft.write_bytes(contents.encode() if isinstance(contents, str) else contents)


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """A temporary name beside `path`: becomes `path` when the block ends well, vanishes when not.

    Raises:
        DiskError: The place cannot be written or is full.
    """
    draft = path.with_name(f".{uuid4().hex}{PART}")
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            _force(draft)
            os.replace(draft, path)
            _force(path.parent)
        finally:
            _remove(draft)


@contextmanager
def told(path: Path) -> Generator[None, None, None]:
    """Turn what the system says of a place that cannot be written into a DiskError, however a library wrapped it."""
    try:
        yield
    except Exception as error:
        for each in _chain(error):
            if isinstance(each, OSError) and each.errno:
                raise DiskError(f"{path} cannot be written: {each.strerror}; {_advice(path, each.errno)}") from error
        raise


def sweep(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder and below it."""
    for draft in folder.rglob(f".*{PART}"):
        _remove(draft)


def free(path: Path) -> int:
    """Free bytes where `path` is or will be."""
    return shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if place.exists())).free


def size(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def cache_folder() -> Path:
    """`$TUNEAVIDEO_CACHE`, or `tuneavideo` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TUNEAVIDEO_CACHE") or Path(home) / "tuneavideo")


def _advice(path: Path, number: int) -> str:
    return f"make room, {size(free(path))} are free there" if number in FULL else "choose another place"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _force(path: Path) -> None:
    """Wait until a file or folder is on the disk; Windows knows this of files only."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)  # if it is a folder
    draft.unlink(missing_ok=True)
