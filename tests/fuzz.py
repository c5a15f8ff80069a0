"""python -m tests.fuzz KIND COPIES: reads damaged copies of a small clip, each in a process of its own.

Prints how many were read, refused with a `VideoError`, and why the others failed, as JSON. A process may take a
gigabyte of address space above what its imports took, and ten seconds of computing.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from tests.clips import animate, barcodes, film
from tuneavideo.errors import VideoError
from tuneavideo.video import read

GIGABYTE = 2**30
SECONDS = 10
READ, REFUSED = 0, 1
FILMS = {
    "mp4": ("libx264", "aac"),
    "mov": ("mjpeg", "pcm_s16le"),
    "webm": ("libvpx", "libopus"),
    "mkv": ("ffv1", "flac"),
    "avi": ("mpeg4", "pcm_s16le"),
    "hevc.mp4": ("libx265", "aac"),
    "vp9.webm": ("libvpx-vp9", "libopus"),
}
CHOICES = ({"count": 4, "stride": 2, "size": (32, 32)}, {"count": 3, "start_time": 0.3, "sample_fps": 7.0}, {})
KINDS = (*FILMS, "gif", "webp")


def clip(kind: str, folder: Path) -> Path:
    """A small whole clip with sound."""
    path, images = folder / f"clip.{kind}", barcodes(8, 64, 48)
    if kind in ("gif", "webp"):
        return animate(path, images, **({"quality": 60} if kind == "webp" else {}))
    codec, sound_codec = FILMS[kind]
    sound = np.sin(np.arange(38_400) / 20)[:, None]
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    return film(
        path,
        images,
        codec,
        "yuvj420p" if codec == "mjpeg" else "yuv420p",
        sound=(sound_codec, sound, 48_000),
        options=options,
    )


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A copy with changed, missing, repeated or foreign bytes, often in the header."""
    copy = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        whole = rng.random() < 0.6
        at, size = int(rng.integers(len(copy) if whole else min(len(copy), 1024))), int(2 ** rng.uniform(0, 7))
        here = slice(at, at + size)
        match rng.choice(
            ["bits", "noise", "zeros", "ones", "gap", "echo", "end"], p=[0.4, 0.2, 0.1, 0.1, 0.07, 0.07, 0.06]
        ):
            case "bits":
                for place in rng.integers(at, len(copy), size=rng.integers(1, 20)):
                    copy[place] ^= 1 << int(rng.integers(8))
            case "noise":
                copy[here] = rng.bytes(len(copy[here]))
            case "zeros" | "ones" as value:
                copy[here] = bytes([255 * (value == "ones")]) * len(copy[here])
            case "gap":
                del copy[here]
            case "echo":
                copy[at:at] = copy[here]
            case "end":
                del copy[max(at, 20) :]
    return bytes(copy)


def attempt(path: Path) -> int:
    """Read as a tuning and as an edit do; a status, or an exception that is not ours."""
    read_any = False
    for options in CHOICES:
        try:
            read(path, **options)
            read_any = True
        except VideoError as error:
            assert "\n" not in str(error), "one line"
    return READ if read_any else REFUSED


def in_a_process(path: Path) -> str:
    """How reading ended: "read", "refused", or what went wrong."""
    out, report = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + GIGABYTE, size + GIGABYTE))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        status = 2
        try:
            status = attempt(path)
        except BaseException:
            os.write(report, traceback.format_exc()[-2000:].encode())
        os._exit(status)
    os.close(report)
    status, deadline = None, time.monotonic() + 6 * SECONDS
    while status is None:
        done, ended = os.waitpid(child, os.WNOHANG)
        if done:
            status = ended
        elif time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = -1
        else:
            time.sleep(0.002)
    with os.fdopen(out) as told:
        trace = told.read()
    if status == -1:
        return "hang"
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return {READ: "read", REFUSED: "refused"}.get(os.WEXITSTATUS(status), trace or "no trace")


def main(kind: str, copies: int, keep: Path | None = None) -> dict[str, int]:
    warnings.simplefilter("ignore")
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = clip(kind, Path(folder))
        data = path.read_bytes()
        assert in_a_process(path) == "read", "the whole clip is read under the same limits"
        for seed in range(copies):
            path.write_bytes(damaged(data, np.random.default_rng(seed)))
            end = in_a_process(path)
            ends[end] += 1
            if keep and end not in ("read", "refused"):
                (keep / f"{seed}-{path.name}").write_bytes(path.read_bytes())
    return dict(ends)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), *map(Path, sys.argv[3:]))))
