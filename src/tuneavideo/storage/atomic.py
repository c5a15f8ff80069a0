"""Atomic writes: a file is written under a temporary name, synced to disk and renamed."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from tuneavideo.errors import DiskError

PART = ".part"
_DRAFT = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(PART)}")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write(path: Path, contents: bytes | str) -> None:
    """Write a file, and its folder if needed, atomically. Raises DiskError when it cannot be written."""
    with replacing(path) as draft:
        draft.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def refuse_foreign(path: Path, mark: str) -> None:
    """Raise DiskError when `path` exists and its first 64 KiB lack `mark`, which every file of this program has."""
    if path.is_file():
        with path.open("rb") as file:
            if mark.encode() not in file.read(2**16):
                raise DiskError(
                    f"{path} exists and was not written by this command; move it away, or give another --out"
                )


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Yield a temporary path, renamed to `path` when the block ends without an error, else removed.

    Raises:
        DiskError: The place cannot be written, is full or is a device such as /dev/null, which a rename would replace.
            Errors of other files that the block opens pass unchanged.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DiskError(f"{path} is a device, a pipe or a socket; give the name of a file")
    draft = path.with_name(f".{uuid4().hex}{PART}")
    with disk_errors(path, draft):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            _force(draft)
            _move(draft, path)
            _fsync(path.parent)
        finally:
            _remove(draft)


@contextmanager
def disk_errors(path: Path, *drafts: Path, advice: str = "choose another place") -> Generator[None, None, None]:
    """Turn the system's error about a write into a DiskError, also when a library wrapped it.

    An error that names a file counts only when that is `path`, one of `drafts`, or a folder above or a file below them.
    """
    try:
        yield
    except Exception as error:
        for each in _chain(error):
            number, reason = getattr(each, "errno", None), getattr(each, "strerror", None)
            if number and reason and _concerns(each, (path, *drafts)):
                raise DiskError(f"{path} cannot be written: {reason}; {_advice(path, number, advice)}") from error
        raise


def is_draft(path: Path) -> bool:
    """Return whether `path` has a name that only `replacing` gives."""
    return _DRAFT.fullmatch(path.name) is not None


def check_writable(folder: Path, advice: str) -> None:
    """Raise DiskError, with this advice, when `folder` or its nearest existing parent cannot be written."""
    place = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    draft = place / f".{uuid4().hex}{PART}"
    with disk_errors(folder, draft, place, advice=advice):
        draft.mkdir()
        draft.rmdir()


def sweep(folder: Path) -> None:
    """Remove temporary files of killed processes in a folder and below it."""
    for draft in filter(is_draft, list(folder.rglob(f".*{PART}"))):
        _remove(draft)


def free(path: Path) -> int:
    """Return the free bytes on the disk of `path`, which need not exist."""
    return shutil.disk_usage(next(place for place in (path, *path.absolute().parents) if place.exists())).free


def size(count: float) -> str:
    """Return bytes as text, such as `1.5 GB`."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def cache_folder() -> Path:
    """Return `$TUNEAVIDEO_CACHE`, or `tuneavideo` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TUNEAVIDEO_CACHE") or Path(home) / "tuneavideo")


def _advice(path: Path, number: int, otherwise: str) -> str:
    return f"make room, {size(free(path))} are free there" if number in FULL else otherwise


def _concerns(error: BaseException, places: tuple[Path, ...]) -> bool:
    name = getattr(error, "filename", None)
    if not isinstance(name, str | bytes | os.PathLike):
        return True
    named = Path(os.fsdecode(name)).absolute()
    absolute = [place.absolute() for place in places]
    return any(named.is_relative_to(place) or place.is_relative_to(named) for place in absolute)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _force(path: Path) -> None:
    """Sync a file, or a folder with all files in it, to the disk; on Windows files only."""
    for each in path.iterdir() if path.is_dir() else ():
        _force(each)
    _fsync(path)


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _move(draft: Path, path: Path) -> None:
    """Rename `draft` to `path`; a folder replaces an existing folder, which `os.replace` refuses."""
    if draft.is_dir() and path.is_dir() and any(path.iterdir()):
        old = path.with_name(f".{uuid4().hex}{PART}")
        os.replace(path, old)
        os.replace(draft, path)
        _remove(old)
    else:
        os.replace(draft, path)


def _remove(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)  # if it is a folder
    draft.unlink(missing_ok=True)
