"""Uploaded and bundled clips. Uploaded files are decoded by other processes, see `decode`."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneavideo import miniature
from tuneavideo import video as videos
from tuneavideo.errors import DiskError, RunError, VideoError
from tuneavideo.storage import atomic
from tuneavideo.storage.run_files import slug

KINDS = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".webp"}
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
        suffix = Path(name.replace("\\", "/")).suffix.lower()
        if suffix not in KINDS:
            raise VideoError("the file's name has no ending of a video; give mp4, mov, webm, mkv, avi, gif or webp")
        folder = self.folder / secrets.token_hex(8)
        path = folder / f"clip-{slug(Path(name.replace(chr(92), '/')).stem)}{suffix}"
        async with self._uploads:
            try:
                with atomic.disk_errors(path):
                    folder.mkdir()
                    await self._write(path, body)
                facts = await self.decode("measure", path=str(path))
                atomic.write(folder / "facts.json", json.dumps(facts))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return self.get(folder.name)

    async def _write(self, path: Path, body: AsyncIterator[bytes]) -> None:
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
                self._facts[clip.id] = await asyncio.to_thread(lambda: videos.probe(clip.path)._asdict())
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
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tuneavideo.web.decode", operation,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            try:
                sent = json.dumps(arguments).encode()
                answer, _ = await asyncio.wait_for(process.communicate(sent), LONGEST)
            except TimeoutError:
                raise VideoError("decoding took too long; give a shorter clip, or a smaller one") from None
            finally:
                if process.returncode is None:
                    process.kill()
        try:
            result = json.loads(answer)
        except ValueError:
            raise VideoError("the clip cannot be decoded: it is damaged, or needs too much memory or time") from None
        if "error" in result:
            raise VideoError(result["error"])
        return result
