"""Comparison of a folder of recorded numbers ("goldens") with this package.

`python -m benchmarks.parity --goldens DIR` takes any folder laid out like ours:

    MODEL/unet2d/                          a diffusers image UNet; its folder names the model
    MODEL/unet3d_temporal.safetensors      what inflation adds to it, in our names
    MODEL/{forward,grad}*.safetensors      predictions; loss and gradients
    MODEL/{unet3d_keys,grad_norms}.json    names and shapes; norms of the gradients
    layers/KIND*.safetensors               one layer with its weights (`layers.LAYERS`)
    ddim/MODEL*.safetensors                inversion and sampling
    train/*.safetensors                    a tuning with its validation; the metadata names the model
    tiny_pipe/, tiny_pipe_*.safetensors    text encoder and VAE
    mindone/*.{ckpt,npz}, names_v1.txt     MindONE's checkpoints, and what its own code made of them

A file that is none of these is skipped, and a skipped file is a failure, as is a difference above its bound.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from benchmarks.parity import mindone, unet
from benchmarks.parity.compare import Difference, Result
from benchmarks.parity.ddim import ddim
from benchmarks.parity.golden import Golden, On, Place
from benchmarks.parity.layers import layer
from benchmarks.parity.pipe import text, vae
from benchmarks.parity.tuning import train

Check = Callable[[Place, Any], Iterator[Difference]]
CHECKS: dict[str, tuple[str, Check]] = {
    # where a file lies (first match): (what it is, how it is checked)
    "*tiny_pipe_text.safetensors": ("text", text),
    "*tiny_pipe_vae.safetensors": ("vae", vae),
    "*layers/*.safetensors": ("layer", layer),
    "*ddim/*.safetensors": ("ddim", ddim),
    "*train/*.safetensors": ("tuning", train),
    "*/forward*_taps*.safetensors": ("taps", unet.taps),
    "*/forward_2d*.safetensors": ("image", unet.still),
    "*/forward*.safetensors": ("forward", unet.forward),
    "*/grad*.safetensors": ("gradient", unet.grad),
    "*/grad_norms.json": ("gradient", unet.grad_norms),
    "*/unet3d_keys.json": ("names", unet.keys),
    "*mindone/small*.ckpt": ("ckpt", mindone.container),
    "*mindone/tiny_sd_v1.ckpt": ("convert", mindone.conversion),
    "*mindone/golden_v1.npz": ("mindone", mindone.models),
    "*mindone/golden_samplers_v1.npz": ("samplers", mindone.samplers),
    "*mindone/golden_adamw.npz": ("adamw", mindone.optimizer),
}
INPUTS = (
    "*/unet2d/diffusion_pytorch_model.safetensors",
    "*/unet3d_temporal.safetensors",
    "*tiny_pipe/*/model.safetensors",
    "*tiny_pipe/*/diffusion_pytorch_model.safetensors",
    "*mindone/small.npz",
)
DESCRIPTIONS = (".md", ".json", ".mp4", ".txt")


def check(folder: Path) -> Iterator[Result]:
    """Compare every file below `folder` with this package's results; yields a result per file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {path.parent.name: path.parent for path in folder.rglob("unet2d") if path.is_dir()}
    pipe = tiny_pipe(folder)
    for path in files:
        name = path.relative_to(folder).as_posix()
        if any(fnmatch(name, each) for each in INPUTS):
            continue
        row = next((row for pattern, row in CHECKS.items() if fnmatch(name, pattern)), None)
        if row:
            yield compared(name, *row, Place(path, found, pipe))
        elif path.suffix not in DESCRIPTIONS:
            yield Result(name, "?", skipped="no check knows this file; see --help for the layout")


def compared(name: str, kind: str, run: Check, place: Place) -> Result:
    """Compare one file; one that cannot be read or lacks a part is skipped with the reason."""
    try:
        json_file = place.path.suffix == ".json"
        golden = json.loads(place.path.read_text(encoding="utf-8")) if json_file else Golden(place.path)
        differences = tuple(run(place, golden))
    except Exception as error:  # whatever it is, the other files are still compared, and a skipped file is a failure
        return Result(name, kind, skipped=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    if not differences:
        return Result(name, kind, skipped="it holds nothing to compare")
    return Result(name, kind, differences, 0 if json_file else len(golden.keys() - golden.read))


def tiny_pipe(folder: Path) -> StableDiffusionPipeline | None:
    """Load text encoder and VAE of the recorded pipeline, if there is one; its UNet is one of the models."""
    index = next(folder.rglob("tiny_pipe/model_index.json"), None)
    return index and StableDiffusionPipeline.from_pretrained(index.parent, unet=None).to(On.device)


def summary(results: list[Result]) -> str:
    """Format the last line: `checked N files, M tensors, worst …`, and how many files were skipped, if any."""
    compared = [result for result in results if not result.skipped]
    tensors = sum(len(result.differences) for result in compared)
    worst = "none: nothing was compared"
    if compared:
        last = max(compared, key=lambda result: result.worst.fraction)
        worst = f"{last.worst.fraction:.0%} of its bound ({last.name}: {last.worst.tensor})"
    skipped = f", skipped {len(results) - len(compared)}" if len(results) > len(compared) else ""
    return f"checked {len(compared)} files, {tensors} tensors, worst {worst}{skipped}"


def main(arguments: list[str] | None = None) -> int:
    """Print a line per file and one for all; return 0 if everything was compared and agrees."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--goldens", type=Path, required=True, help="folder of recorded numbers")
    parser.add_argument("--device", default="cpu", help="where to compute, such as cuda")
    options = parser.parse_args(arguments)
    On.device = torch.device(options.device)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # a convolution on a GPU is rounded to 10 bits otherwise
    results = []
    for result in check(options.goldens):
        print(result, flush=True)
        results.append(result)
    print(summary(results))
    return 0 if results and all(result.ok for result in results) else 1
