"""Process that decodes one uploaded file, with limits on its memory, its time and what it writes.

    python -m tuneavideo.web.decode OPERATION

Arguments are read from stdin and the result is written to stdout, both as JSON.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"

from tuneavideo import video as videos
from tuneavideo.bases import BASES
from tuneavideo.errors import TuneAVideoError, VideoError, error_line
from tuneavideo.jobs.plan import default_frames

MEMORY = 3 * 2**29  # bytes of address space
CPU_SECONDS = 120
LARGEST_FILE = 2**30  # bytes written
MAX_PIXELS = 2**23 + 2**21  # of a frame: 4096 x 2560
MAX_SECONDS = 180  # of a clip
MAX_FRAMES = 20_000
PREVIEW = 360  # pixels of a preview's longer side
STRIP = 96  # pixels of the height of a frame in a strip
MOST_SHOWN = 64  # frames of a strip
STILL = 512  # pixels of the longer side of a frame that is described
PICTURES = (b"\x89PNG", b"\xff\xd8\xff")
BEGINNINGS = {0: (b"\x1aE\xdf\xa3", b"RIFF", b"GIF8"), 4: (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")}


def check_kind(path: Path, more: tuple[bytes, ...] = ()) -> None:
    """Raise VideoError for a file that is no mp4, mov, webm, mkv, avi, gif or webp by its first bytes, nor `more`.

    FFmpeg would also read playlists, which name other files.
    """
    with path.open("rb") as file:
        head = file.read(16)
    if not any(head[at:].startswith(words) for at, words in BEGINNINGS.items()) and not head.startswith(
        more or b"\0\0"
    ):
        pictures = ", png or jpg" if more else ""
        raise VideoError(f"the file is no video; give mp4, mov, webm, mkv, avi, gif or webp{pictures}")


def check_size(path: str) -> Any:
    """Return facts on a clip. Raises VideoError when its frames or their number are too large."""
    found = videos.probe(Path(path))
    if found.width * found.height > MAX_PIXELS:
        raise VideoError(f"frames of {found.width} x {found.height}; at most 4096 x 2560: scale the clip down first")
    if found.seconds > MAX_SECONDS or found.seconds * found.fps > MAX_FRAMES:
        raise VideoError(
            f"the clip lasts {found.seconds:.0f} s; at most {MAX_SECONDS} s and {MAX_FRAMES:,} frames: cut out a part"
        )
    return found


def measure(path: str) -> dict[str, Any]:
    """Return facts on a clip. Raises VideoError when it is no video, or too large."""
    check_kind(Path(path))
    found = check_size(path)
    videos.read(path, count=1)  # its first frame can be decoded
    return found._asdict()


def preview(path: str, out: str) -> dict[str, Any]:
    """Write a small mp4 of all frames that every browser plays."""
    side = _bounded(PREVIEW)
    clip = videos.read_any(path, Path(out).parent, size=side)
    Path(out).write_bytes(videos.encode_for_page(clip, PREVIEW))
    return {"frames": clip.frames, "fps": clip.fps}


def _bounded(most: int) -> Callable[[int, int], tuple[int, int]]:
    def size(width: int, height: int) -> tuple[int, int]:
        scale = min(1.0, most / max(width, height))
        return max(2, round(width * scale)), max(2, round(height * scale))

    return size


def strip(path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the frames that a tuning takes as one JPEG file, and when they are shown.

    `settings` are those of `TuneSettings` that choose frames and size, and `base`.
    """
    base = BASES.get(settings["base"])
    choice: dict[str, Any] = {name: settings.get(name) for name in ("start_time", "sample_fps", "stride")}
    span = videos.choose_span(path, usual=default_frames(settings["base"]), count=settings.get("num_frames"), **choice)
    resolution = settings.get("resolution") or (base.settings["resolution"] if base else 512)
    multiple = 32 if settings["base"] == "miniature" else 64
    fit = settings.get("fit") or "crop"
    sizes = list[tuple[int, int]]()

    def size(width: int, height: int) -> tuple[int, int]:
        shape = (1, 1) if fit == "stretch" else (width, height)
        sizes.append(videos.area_size(*shape, area=resolution**2, multiple=multiple))
        return sizes[-1]

    clip = videos.read_any(
        path, Path(path).parent, stride=span.stride or 1, count=span.count, start_time=span.begin,
        sample_fps=choice["sample_fps"], size=size, fit=fit, fewer=True,
    )  # fmt: skip
    width, height = sizes[0]
    wide = max(1, round(STRIP * width / height))
    every = -(-clip.frames // MOST_SHOWN)
    shown = [videos.resize(image, wide, STRIP) for number, image in enumerate(clip.images) if number % every == 0]
    times = [span.begin + number * span.step for number in range(clip.frames)]
    return {
        "frames": clip.frames, "shown": len(shown), "times": times, "width": width, "height": height,
        "seconds": span.seconds, "picture": _jpeg(shown), "frame_width": wide, "frame_height": STRIP,
    }  # fmt: skip


def _jpeg(images: list[Any]) -> str:
    import numpy as np
    from PIL import Image

    with io.BytesIO() as file:
        Image.fromarray(np.concatenate(images, axis=1)).save(file, format="JPEG", quality=85)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def still(path: str, time: float) -> dict[str, Any]:
    """Return the frame at a time in seconds as PNG, base64."""
    from PIL import Image

    folder, size = Path(path).parent, _bounded(STILL)
    image = videos.read_any(path, folder, start_time=time, count=1, size=size, fewer=True).images
    with io.BytesIO() as file:
        Image.fromarray(next(iter(image))).save(file, format="PNG")
        return {"picture": base64.b64encode(file.getvalue()).decode()}


def mask(path: str, clip: str, fit: Any, out: str) -> dict[str, Any]:
    """Write a mask of a clip as PNG files into a new folder. Raises VideoError when it does not fit the clip."""
    from PIL import Image

    from tuneavideo.video.masks import Mask

    check_kind(Path(path), PICTURES)
    check_size(path)
    inside_THW = Mask.read(Path(path), videos.read_any(clip, Path(path).parent), fit).inside_THW
    Path(out).mkdir()
    for number, inside_HW in enumerate(inside_THW):
        Image.fromarray(inside_HW.astype("uint8") * 255).save(Path(out) / f"{number:05d}.png")
    return {"frames": len(inside_THW)}


def comment(path: str) -> dict[str, Any]:
    """Return the comment of a video."""
    check_kind(Path(path))
    return {"comment": videos.probe(Path(path)).comment}


def download(path: str, out: str, form: str, comment: str) -> dict[str, Any]:
    """Write an edit as mp4 with a comment, as GIF or as a zip file of PNG files."""
    if form == "mp4":
        videos.with_comment(Path(path), Path(out), comment)
        return {}
    clip = videos.read(path)
    if form == "gif":
        videos.write(replace(clip, fps=min(clip.fps, videos.FASTEST_GIF)), out)
    else:
        from PIL import Image

        with zipfile.ZipFile(out, "w") as file:
            for number, image in enumerate(clip.images):
                with file.open(f"{number:05d}.png", "w") as each:
                    Image.fromarray(image).save(each, format="PNG")
            file.writestr("settings.json", comment)
    return {}


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "measure": measure, "preview": preview, "strip": strip, "comment": comment, "download": download, "still": still,
    "mask": mask,
}  # fmt: skip


def limit_process() -> None:
    """Limit this process where the system can."""
    try:
        import resource
    except ImportError:
        return
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, CPU_SECONDS), (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))


def main(operation: str) -> None:
    """Run an operation, and print its result or its error."""
    arguments = json.load(sys.stdin)
    limit_process()
    try:
        result = OPERATIONS[operation](**arguments)
    except TuneAVideoError as error:
        place = f"{arguments['path']} "
        result = {"error": error_line(error).replace(place, "the clip ").replace(place.strip(), "the clip")}
    except MemoryError:
        result = {"error": "the clip needs too much memory; scale it down first"}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
