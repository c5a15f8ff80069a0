"""Recorded tensors of a file, and the models and noise schedule they were computed with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tuneavideo.method.inflate import VideoUNet, added_parameters, inflate
from tuneavideo.method.noise import NoiseSchedule
from tuneavideo.settings import PRESETS

OFFICIAL = PRESETS["official"]
SPACING = OFFICIAL["timestep_spacing"]


class On:
    """The device of all computations; set once, by `folder.main`."""

    device = torch.device("cpu")


class Golden(dict[str, Tensor]):
    """Tensors of a file by name, its metadata `about`, and the names that were `read`."""

    def __init__(self, path: Path) -> None:
        entries: dict[str, str] = {}
        if path.suffix == ".npz":
            super().__init__({name: torch.from_numpy(array).to(On.device) for name, array in np.load(path).items()})
        elif path.suffix == ".safetensors":
            super().__init__({name: tensor.to(On.device) for name, tensor in load_file(path).items()})
            with safe_open(path, "pt") as file:
                entries = file.metadata() or {}
        self.about = {name: json.loads(value) for name, value in entries.items() if name != "format"}
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `prefix`, by the remainder of the name."""
        return {name.removeprefix(prefix): self[name] for name in self if name.startswith(prefix)}

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the inputs of a UNet: latents, timestep or timesteps, text."""
        t = self["timesteps" if "timesteps" in self else "timestep"]
        return self["latents"], t, self["encoder_hidden_states"]

    def matching(self, pattern: str) -> Iterator[tuple[str, re.Match[str]]]:
        """Return the names that match `pattern` fully, with its groups."""
        return ((name, match) for name in self if (match := re.fullmatch(pattern, name)))


@dataclass(frozen=True)
class Place:
    """A file, and the models and pipeline recorded with it."""

    path: Path
    models: dict[str, Path]
    pipe: StableDiffusionPipeline | None

    def model(self, name: str) -> Path:
        """Return the folder of the model with the longest name that `name` begins with."""
        return self.models[max((each for each in self.models if name.startswith(each)), key=len)]


def image_unet(folder: Path) -> UNet2DConditionModel:
    """Load a model as it was before inflation."""
    return torch.nn.Module.to(UNet2DConditionModel.from_pretrained(folder / "unet2d"), On.device)


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> VideoUNet:
    """Load a model, inflated and with its temporal weights."""
    video, temporal = inflate(image_unet(folder)), load_file(folder / "unet3d_temporal.safetensors")
    if temporal.keys() != added_parameters(video.unet).keys():
        raise ValueError("unet3d_temporal names other tensors than inflation adds")
    give(video.unet, temporal)
    video.unet.to(dtype)
    return video


def give(unet: UNet2DConditionModel, weights: dict[str, Tensor]) -> None:
    """Load tensors into a UNet by name."""
    if unknown := unet.load_state_dict(weights, strict=False).unexpected_keys:
        raise ValueError(f"the UNet has no {unknown[0]}")


def levels(set_alpha_to_one: bool = False) -> NoiseSchedule:
    """Return the noise schedule of Stable Diffusion 1, with which all was recorded."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return NoiseSchedule.of(DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=set_alpha_to_one))
