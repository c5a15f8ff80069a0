"""Damaged copies of small clips and of settings, each read in a process of its own.

A process may take a gigabyte of address space above what its imports took, and ten seconds of computing.
"""

from __future__ import annotations

import random
import resource
import signal
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from tests import forks
from tests.clips import animate, barcodes, encode
from tuneavideo.config import checked, read_yaml
from tuneavideo.errors import SettingsError, TuneAVideoError, VideoError
from tuneavideo.settings import TuneSettings
from tuneavideo.video import read

GIGABYTE = 2**30
SECONDS = 10
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
ODD = [b"\t", b"\n", b": ", b"- ", b"[", b"{", b"}", b"&a ", b"*a", b"!!python/object:os.system ", b"|", b">", b"'",
       b'"', b"#", b"%", b"\x00", b"\xff\xfe", b"? ", b"---\n", b"9" * 5000, b"1e999", b"~", b"2001-99-99", b"0x", b"=",
       b"!!binary ", b"<<: ", "\u2028".encode(), b"-.inf", b"[" * 400]  # fmt: skip


def clip(kind: str, folder: Path) -> Path:
    """A small whole clip with sound."""
    path, images = folder / f"clip.{kind}", barcodes(8, 64, 48)
    if kind in ("gif", "webp"):
        return animate(path, images, **({"quality": 60} if kind == "webp" else {}))
    codec, sound_codec = FILMS[kind]
    sound = np.sin(np.arange(38_400) / 20)[:, None]
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    return encode(
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


def mutated(text: str, chance: random.Random) -> bytes:
    """A few bytes lost, doubled, moved or replaced by what means something in YAML."""
    data = text.encode()
    for _ in range(chance.randint(1, 3)):
        a = chance.choice([chance.randrange(len(data)), data.find(b": ", chance.randrange(len(data))) + 2])
        b = min(len(data), a + chance.choice([0, 1, 5, max(0, data.find(b"\n", a) - a)]))
        put = chance.choice([b"", data[b:a], data[a:b] * 2, chance.choice(ODD), chance.choice(ODD)])
        data = data[:a] + put + data[b:]
    return data


def read_clip(path: Path) -> None:
    """As a tuning and as an edit do."""
    refused = 0
    for options in CHOICES:
        try:
            read(path, **options)
        except VideoError as error:
            assert "\n" not in str(error), "one line"
            refused += 1
    if refused == len(CHOICES):
        raise VideoError("refused each time")


def read_settings(path: Path) -> None:
    """As a tuning does."""
    try:
        checked(TuneSettings, read_yaml(path, TuneSettings), path.name)
    except SettingsError as error:
        assert path.name in str(error) and "\n" not in str(error) and len(str(error)) < 2000
        raise


def attempt(reading: Callable[[Path], None], path: Path) -> None:
    """Read under limits; the last word printed is "read" or "refused"."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + GIGABYTE, size + GIGABYTE))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    try:
        reading(path)
        print("\nread")
    except TuneAVideoError:
        print("\nrefused")


def tried(reading: Callable[[Path], None], path: Path, log: Path) -> str:
    """How reading ended in a copy of a process: "read", "refused", or what went wrong."""
    code, output = forks.run(partial(attempt, reading, path), log, 6 * SECONDS)
    if code is None:
        return "hang"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return output.split()[-1] if code == 0 else output[-2000:]


def ends(kind: str, seeds: Iterable[int], folder: Path) -> dict[str, list[int]]:
    """How reading damaged copies of a clip ended, with the seeds of the copies that ended so."""
    found: dict[str, list[int]] = {"read": [], "refused": []}
    path = clip(kind, folder)
    data = path.read_bytes()
    assert tried(read_clip, path, folder / "log") == "read", "the whole clip is read under the same limits"
    for seed in seeds:
        path.write_bytes(damaged(data, np.random.default_rng(seed)))
        found.setdefault(tried(read_clip, path, folder / "log"), []).append(seed)
    return found
