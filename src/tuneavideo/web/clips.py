"""Uploaded and bundled clips. Uploaded files are decoded by other processes, see `decode`."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneavideo import miniature
from tuneavideo.errors import DiskError, RunError, VideoError
from tuneavideo.storage import atomic
from tuneavideo.storage.run_files import slug
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.web.requests import answer_of

KINDS = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".webp"}
MASKS = KINDS | {".png", ".jpg", ".jpeg"}
UPLOADED = re.compile(r"[0-9a-f]{16}")
LONGEST = 150.0  # seconds of a decoding process
AT_ONCE = 2  # decoding processes
UPLOADS = 4  # uploads at the same time
ROOM = 2**29  # bytes that stay free on the disk


@dataclass(frozen=True)
class Clip:
    """A clip that can be tuned on.

    Attributes:
        id: Name in addresses.
        name: Name that users see.
        path: The file.
        caption: Caption of a bundled clip; empty for an uploaded one.
    """

    id: str
    name: str
    path: Path
    caption: str = ""

    @property
    def is_bundled(self) -> bool:
        return bool(self.caption)


class Clips:
    """The clips of a root folder."""

    def __init__(self, root: Path) -> None:
        self.folder = root / ".web" / "clips"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bundled = {
            clip["name"]: Clip(clip["name"], clip["name"], Path(clip["path"]), clip["caption"])
            for clip in miniature.clips()
        }
        self._facts: dict[str, dict[str, Any]] = {}
        self._decoding, self._uploads = asyncio.Semaphore(AT_ONCE), asyncio.Semaphore(UPLOADS)
        self._previews: dict[str, asyncio.Lock] = {}

    def get(self, name: str) -> Clip:
        """Return a clip. Raises RunError when there is none."""
        if name in self.bundled:
            return self.bundled[name]
        folder = self.folder / name
        if UPLOADED.fullmatch(name) and folder.is_dir() and not folder.is_symlink():
            files = [file for file in folder.glob("clip-*") if file.suffix in KINDS]
            if files:
                return Clip(name, files[0].stem.removeprefix("clip-"), files[0])
        raise RunError("there is no such clip; upload it again")

    def uploaded(self) -> list[Clip]:
        """Return the uploaded clips, newest first."""
        folders = sorted(self.folder.iterdir(), key=lambda folder: -folder.stat().st_mtime)
        return [self.get(folder.name) for folder in folders if (folder / "facts.json").is_file()]

    async def store(self, name: str, body: AsyncIterator[bytes]) -> Clip:
        """Write an uploaded file to disk as it arrives, and measure it.

        Raises:
            VideoError: It is no video, or too large; nothing is kept.
            DiskError: The disk is full.
        """
        path = self._place(name, KINDS, "a video; give mp4, mov, webm, mkv, avi, gif or webp")
        async with self._uploads:
            try:
                await self._write(path, body)
                facts = await self.decode("measure", path=str(path))
                atomic.write(path.parent / "facts.json", json.dumps(facts))
            except BaseException:
                shutil.rmtree(path.parent, ignore_errors=True)
                raise
        return self.get(path.parent.name)

    async def store_mask(self, name: str, body: AsyncIterator[bytes], run: RunFolder) -> str:
        """Write an uploaded mask as PNG files into `masks` of a run, at the size of its clip, and return its name.

        Raises:
            VideoError: It is no picture or video, or does not fit the clip; nothing is kept.
            DiskError: The disk is full.
        """
        path, fit = self._place(name, MASKS, "a picture or a video"), run.read_settings().fit
        folder = run.path / "masks"
        async with self._uploads:
            try:
                await self._write(path, body)
                draft = path.parent / "mask"
                await self.decode("mask", path=str(path), clip=str(run.source), fit=fit, out=str(draft))
                stem, number = slug(Path(name.replace(chr(92), "/")).stem), 1
                with atomic.disk_errors(folder):
                    folder.mkdir(exist_ok=True)
                    while (made := folder / f"{stem}-{number}").exists():
                        number += 1
                    draft.rename(made)
            finally:
                shutil.rmtree(path.parent, ignore_errors=True)
        return made.name

    def _place(self, name: str, kinds: Set[str], expected: str) -> Path:
        """Return a file in a new folder. Raises VideoError when the name of an upload has another ending."""
        plain = Path(name.replace("\\", "/"))
        if plain.suffix.lower() not in kinds:
            raise VideoError(f"the file's name has no ending of {expected}")
        return self.folder / secrets.token_hex(8) / f"clip-{slug(plain.stem)}{plain.suffix.lower()}"

    async def _write(self, path: Path, body: AsyncIterator[bytes]) -> None:
        """Write a file into its new folder. Raises DiskError when the disk is full."""
        with atomic.disk_errors(path):
            path.parent.mkdir()
            with path.open("wb") as file:
                async for chunk in body:
                    if atomic.free(path.parent) < ROOM:
                        raise DiskError("the disk of the page is full; delete runs or clips")
                    await asyncio.to_thread(file.write, chunk)

    async def facts(self, clip: Clip) -> dict[str, Any]:
        """Return width, height, seconds, frames per second and comment of a clip."""
        if clip.id not in self._facts:
            file = clip.path.parent / "facts.json"
            if clip.is_bundled:
                self._facts[clip.id] = await asyncio.to_thread(_probed, clip.path)
            else:
                self._facts[clip.id] = json.loads(file.read_bytes())
        return self._facts[clip.id]

    async def preview(self, clip: Clip) -> Path:
        """Return a file of a clip that every browser plays."""
        if clip.is_bundled:
            return clip.path
        path = clip.path.parent / "preview.mp4"
        async with self._previews.setdefault(clip.id, asyncio.Lock()):
            if not path.is_file():
                draft = path.with_name("preview.part")
                await self.decode("preview", path=str(clip.path), out=str(draft))
                draft.replace(path)
        return path

    def delete(self, clip: Clip) -> None:
        """Delete an uploaded clip. Raises RunError for a bundled one."""
        if clip.is_bundled:
            raise RunError("a bundled clip cannot be deleted")
        self._facts.pop(clip.id, None)
        shutil.rmtree(clip.path.parent)

    async def decode(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Run an operation of `decode` in a process of its own. Raises VideoError when it fails."""
        async with self._decoding:
            return await answer_of(
                "tuneavideo.web.decode", arguments, operation, seconds=LONGEST, kind=VideoError, what="decoding"
            )


def _probed(path: Path) -> dict[str, Any]:
    from tuneavideo import video as videos  # slow to import: the first page goes before

    return videos.probe(path)._asdict()
