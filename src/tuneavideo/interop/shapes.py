"""Configs of the models that tensors make up, and the names and shapes these models want."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tuneavideo.errors import CheckpointError
from tuneavideo.interop.lazy import Tensors
from tuneavideo.interop.names import TEXT, UNET, VAE, Layout

# What no tensor tells, as every Stable Diffusion 1 and 2 has it.
MOST_LAYERS = 200
GROUPS, HEADS, HEAD_CHANNELS, SCALING = 32, 8, 64, 0.18215
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}
TEMPORAL = (".attn_temp.", ".norm_temp.")
BUFFERS = ("position_ids",)


@dataclass
class Fit:
    """How tensors fit the models they are for; all names are ours."""

    used: int = 0
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)


def configs(tensors: Tensors) -> dict[str, dict[str, Any]]:
    """Config of each model that the tensors make up, read from their shapes."""
    made: dict[str, Callable[[Tensors], dict[str, Any]]] = {"unet": _unet, "vae": _vae, "text_encoder": _text}
    present = {name.split(".")[0] for name in tensors}
    try:
        return {part: make(tensors) for part, make in made.items() if part in present}
    except (KeyError, IndexError, ValueError, StopIteration) as error:
        raise CheckpointError(f"no Stable Diffusion 1 or 2 can be made of it: {error} is missing or odd") from None


def is_linear(tensors: Tensors) -> bool:
    """Whether the UNet's projections are linear layers, which tells Stable Diffusion 2 from 1."""
    return any(
        name.startswith(UNET) and name.endswith("proj_in.weight") and len(t.shape) == 2 for name, t in tensors.items()
    )


def fit(tensors: Tensors, known: Mapping[str, Mapping[str, Any]]) -> Fit:
    """Compare tensors with what the models of the configs `known` want; temporal layers go with the UNet."""
    wanted = {name: shape for part, config in known.items() for name, shape in shapes(part, config).items()}
    told = Fit(missing=sorted(wanted.keys() - tensors.keys()))
    for name, tensor in tensors.items():
        expected = tensor.shape if name.startswith(UNET) and any(t in name for t in TEMPORAL) else wanted.get(name)
        if expected is None:
            told.unused.append(name)
        elif expected != tensor.shape:
            told.different.append(f"{name} is {tensor.shape}, expected {expected}")
        else:
            told.used += 1
    return told


def shapes(part: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Our names and the shapes of a model's tensors; no memory is taken."""
    deep = [config.get(name) for name in ("layers_per_block", "num_hidden_layers", "transformer_layers_per_block")]
    if any(isinstance(each, int) and each > MOST_LAYERS for each in deep):
        raise CheckpointError(
            f"{part}: a config of {max(map(int, filter(None, deep)))} layers; it is damaged or malicious"
        )
    try:
        with torch.device("meta"):
            model: nn.Module = _BUILD[part](dict(config))
    except Exception as error:  # configs of strangers make these libraries raise anything
        raise CheckpointError(f"{part}: no model can be made of its config: {str(error)[:200]}") from None
    return {
        ours(f"{part}.{name}"): tuple(value.shape)
        for name, value in model.state_dict().items()
        if not name.endswith(BUFFERS)
    }


def ours(name: str) -> str:
    """The text encoder's names begin with `text_model`; transformers 5 leaves that out."""
    rest = name.removeprefix(TEXT)
    return f"{TEXT}text_model.{rest}" if rest != name and not rest.startswith(("text_model.", "text_proj")) else name


_BUILD: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unet": lambda config: UNet2DConditionModel.from_config(config),
    "vae": lambda config: AutoencoderKL.from_config(config),
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig(**config)),
}


def _unet(tensors: Tensors) -> dict[str, Any]:
    layout = Layout.of_ours(list(tensors))
    levels = range(layout.levels)
    channels = [tensors[f"{UNET}down_blocks.{n}.resnets.0.conv1.weight"].shape[0] for n in levels]
    downs = [f"{'CrossAttn' if n in layout.attention else ''}DownBlock2D" for n in levels]
    ups = [f"{'CrossAttn' if n in layout.attention else ''}UpBlock2D" for n in reversed(levels)]
    width = next(
        t.shape[1] for name, t in tensors.items() if name.startswith(UNET) and name.endswith("attn2.to_k.weight")
    )
    linear = is_linear(tensors)
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": [max(1, each // HEAD_CHANNELS) for each in channels] if linear else HEADS,
        "block_out_channels": channels,
        "center_input_sample": False,
        "cross_attention_dim": width,
        "down_block_types": downs,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": tensors[f"{UNET}conv_in.weight"].shape[1],
        "layers_per_block": layout.blocks,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "norm_num_groups": GROUPS,
        "out_channels": tensors[f"{UNET}conv_out.weight"].shape[0],
        "sample_size": 64,
        "up_block_types": ups,
        "use_linear_projection": linear,
    }


def _vae(tensors: Tensors) -> dict[str, Any]:
    def count(place: str) -> int:
        return len({name.removeprefix(place).split(".")[0] for name in tensors if name.startswith(place)})

    levels = count(f"{VAE}encoder.down_blocks.")
    place = f"{VAE}encoder.down_blocks"
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [tensors[f"{place}.{n}.resnets.0.conv1.weight"].shape[0] for n in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": tensors[f"{VAE}encoder.conv_in.weight"].shape[1],
        "latent_channels": tensors[f"{VAE}decoder.conv_in.weight"].shape[1],
        "layers_per_block": count(f"{place}.0.resnets."),
        "norm_num_groups": GROUPS,
        "out_channels": tensors[f"{VAE}decoder.conv_out.weight"].shape[0],
        "sample_size": 512,
        "scaling_factor": SCALING,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _text(tensors: Tensors) -> dict[str, Any]:
    layers = f"{TEXT}text_model.encoder.layers."
    vocabulary, width = tensors[f"{TEXT}text_model.embeddings.token_embedding.weight"].shape
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "hidden_act": "gelu" if is_linear(tensors) else "quick_gelu",
        "hidden_size": width,
        "intermediate_size": tensors[f"{layers}0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": tensors[f"{TEXT}text_model.embeddings.position_embedding.weight"].shape[0],
        "num_attention_heads": max(1, width // HEAD_CHANNELS),
        "num_hidden_layers": len(
            {name.removeprefix(layers).split(".")[0] for name in tensors if name.startswith(layers)}
        ),
        "projection_dim": width,
        "vocab_size": vocabulary,
    }
