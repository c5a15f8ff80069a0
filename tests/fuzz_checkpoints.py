"""python -m tests.fuzz_checkpoints COPIES: opens damaged copies of checkpoints and YAML files of every kind.

One process opens all, with a gigabyte of address space beyond its imports and ten seconds per copy. Prints as JSON how
many copies were read, were refused with a `TuneAVideoError`, and ended otherwise.
"""

from __future__ import annotations

import json
import logging
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tests.fuzz import damaged
from tuneavideo.config import checked, layers
from tuneavideo.errors import CheckpointError, TuneAVideoError
from tuneavideo.interop import foreign_configs, mindspore, model_configs
from tuneavideo.interop.names import MINDONE as SCHEME
from tuneavideo.interop.names import renamed
from tuneavideo.interop.reading import read_checkpoint
from tuneavideo.settings import TuneSettings
from tuneavideo.storage.tensors import LazyTensor

GIGABYTE, SECONDS = 2**30, 10
CONFIGS = Path(__file__).parent / "configs"
SMALL = Path(__file__).parent / "goldens" / "mindone"


def weights() -> dict[str, torch.Tensor]:
    """A UNet's names with few numbers."""
    names = [line.split("\t")[0] for line in (SMALL / "names_v1.txt").read_text().splitlines()[:120]]
    ours = renamed(names, SCHEME, back=True)
    return {name.removeprefix("unet."): torch.ones(2, 2) * n for n, name in enumerate(ours.values())}


def originals(folder: Path) -> dict[str, bytes]:
    """Whole files by name."""
    save_file(weights(), folder / "x.safetensors")
    torch.save(weights(), folder / "x.pth")
    torch.save(weights(), folder / "legacy.bin", _use_new_zipfile_serialization=False)
    theirs = {name: LazyTensor.of(t) for name, t in zip(_mindone_names(), weights().values(), strict=False)}
    mindspore.write(folder / "y.ckpt", theirs, crc=False)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {
        name: (SMALL / name).read_bytes()
        for name in ("small.ckpt", "small_append.ckpt", "small_crc.ckpt", "small_enc_AES-GCM.ckpt")
    }
    return files | {path.name: path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml"), reverse=True)}


def _mindone_names() -> list[str]:
    return [line.split("\t")[0] for line in (SMALL / "names_v1.txt").read_text().splitlines()[:120]]


def opened(path: Path) -> None:
    """All that a conversion or a tuning does with a file before it builds a model."""
    if path.suffix == ".yaml":
        checked(TuneSettings, layers({"seed": 1}, foreign_configs.read_config(path, TuneSettings).settings), str(path))
        return
    found = read_checkpoint(path)
    for tensor in found.tensors.values():
        tensor.read()
    with suppress(CheckpointError):  # parts of a UNet have no family
        model_configs.family_folder(found.tensors)


def ending(work: Callable[[Path], None], path: Path) -> str:
    signal.alarm(SECONDS)
    try:
        work(path)
        return "read"
    except TuneAVideoError as error:
        return "refused" if "\n" not in str(error) else f"two lines: {error}"
    except BaseException:
        return traceback.format_exc()[-1500:]
    finally:
        signal.alarm(0)


def swapped(data: bytes, seed: int) -> bytes:
    """Damage of the kind that parsers meet: a number, a word or a line changed for another."""
    rng = random.Random(seed)
    words = [
        b"-1",
        b"0",
        b"null",
        b"[]",
        b"{}",
        b"99999999999999999999",
        b"1e999",
        b"'",
        b"\xff",
        b": :",
        b"&a *a",
        b"!!python/object:os.system",
    ]
    lines = data.split(b"\n")
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(b":")
        lines[at] = key + colon + b" " + rng.choice(words) if colon else rng.choice(words)
    return b"\n".join(lines)


def main(copies: int) -> dict[str, int]:
    logging.disable()

    def late(*_: object) -> None:
        raise TimeoutError("hang")

    signal.signal(signal.SIGALRM, late)
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = originals(folder)
        for file in files:
            (folder / file).write_bytes(files[file])
            whole = ending(opened, folder / file)
            assert whole == ("refused" if "enc" in file else "read"), f"{file}: {whole}"
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + GIGABYTE, size + GIGABYTE))
        for seed in range(copies):
            file = list(files)[seed % len(files)]
            path = folder / file
            text = file.endswith(".yaml") and seed % 2
            path.write_bytes(swapped(files[file], seed) if text else damaged(files[file], np.random.default_rng(seed)))
            ends[ending(opened, path)] += 1
    return dict(ends)


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
