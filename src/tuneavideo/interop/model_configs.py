"""Configs of the models in a checkpoint, and the names and shapes of the tensors that these models need."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tuneavideo.errors import CheckpointError
from tuneavideo.interop.names import BUFFERS, UNET, is_temporal, with_text_model
from tuneavideo.models.loading import CONFIGS, FAMILIES
from tuneavideo.storage.tensors import Tensors

CONFIG, MODEL_INDEX = "config.json", "model_index.json"
OFFICIAL_UNET = "UNet3DConditionModel"  # of the published code; diffusers has another class of this name
_MAX_LAYERS = 200
# Arguments of the published code's UNet; its class refuses others.
_OFFICIAL_ARGUMENTS = (
    "sample_size", "in_channels", "out_channels", "center_input_sample", "flip_sin_to_cos", "freq_shift",
    "down_block_types", "mid_block_type", "up_block_types", "only_cross_attention", "block_out_channels",
    "layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps",
    "cross_attention_dim", "attention_head_dim", "dual_cross_attention", "use_linear_projection", "class_embed_type",
    "num_class_embeds", "upcast_attention", "resnet_time_scale_shift",
)  # fmt: skip
_MODELS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unet": lambda config: UNet2DConditionModel.from_config(config),
    "vae": lambda config: AutoencoderKL.from_config(config),
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
}


@dataclass
class Fit:
    """Comparison of tensors with the models they are for; all names are ours."""

    used: int = 0
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError when the file is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({str(error)[:120]}); copy it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def family_folder(tensors: Tensors) -> Path:
    """Return the folder of configs for tensors of Stable Diffusion 1 or 2. Raises CheckpointError for other models."""
    widths = [t.shape[-1] for name, t in tensors.items() if name.startswith(UNET) and "attn2.to_k.weight" in name]
    family = FAMILIES.get(widths[0]) if widths else None
    if family not in ("sd1", "sd2"):
        raise CheckpointError(
            f"no config for a UNet with text embeddings of width {widths[0] if widths else 'unknown'}; known are 768 "
            "and 1024 (Stable Diffusion 1 and 2); give a model of the same shape with --like"
        )
    return CONFIGS / family


def compare(tensors: Tensors, configs: Mapping[str, Mapping[str, Any]]) -> Fit:
    """Compare tensors with those that models of these configs need; temporal layers belong to every UNet."""
    needed = {name: shape for part, config in configs.items() for name, shape in shapes(part, config).items()}
    fit = Fit(missing=sorted(needed.keys() - tensors.keys()))
    for name, tensor in tensors.items():
        expected = tensor.shape if is_temporal(name) else needed.get(name)
        if expected is None:
            fit.unused.append(name)
        elif expected != tensor.shape:
            fit.different.append(f"{name} is {tensor.shape}, expected {expected}")
        else:
            fit.used += 1
    return fit


def shapes(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return our names and the shapes of a model's tensors, computed on the meta device.

    Raises:
        CheckpointError: No model can be made of the config.
    """
    depths = [config.get(name) for name in ("layers_per_block", "num_hidden_layers", "transformer_layers_per_block")]
    if any(isinstance(each, int) and each > _MAX_LAYERS for each in depths):
        raise CheckpointError(f"{part}: a config of more than {_MAX_LAYERS} layers; it is damaged or malicious")
    try:
        with torch.device("meta"):
            model: nn.Module = _MODELS[part](dict(config))
    except Exception as error:  # the libraries raise any type for an invalid config
        raise CheckpointError(f"{part}: no model can be made of its config: {str(error)[:200]}") from None
    return {
        with_text_model(f"{part}.{name}"): tuple(value.shape)
        for name, value in model.state_dict().items()
        if not name.endswith(BUFFERS)
    }


def from_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the config of the published code's UNet to that of the image UNet."""
    return _with_blocks(config, "3D", "2D") | {"_class_name": "UNet2DConditionModel"}


def to_official(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an image UNet's config to that of the published code's UNet."""
    known = {name: config[name] for name in _OFFICIAL_ARGUMENTS if name in config}
    known["mid_block_type"] = config.get("mid_block_type") or "UNetMidBlock2DCrossAttn"
    return {"_class_name": OFFICIAL_UNET, "_diffusers_version": "0.11.1", **_with_blocks(known, "2D", "3D")}


def _with_blocks(config: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """Replace the dimension in the names of block classes."""
    return json.loads(json.dumps(dict(config)).replace(f"Block{old}", f"Block{new}"))
