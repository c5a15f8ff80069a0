"""Bases of each family at tiny size, of their real classes, and their tensors under the names of the original files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.conftest import base_folder, image_unet
from tests.shared.inflation import SHAPES

XL = SHAPES["xl"] | {"projection_class_embeddings_input_dim": 16 + 6 * 8}
UNETS = {"sd1": SHAPES["sd1"], "sd2": SHAPES["sd2"], "turbo": SHAPES["sd2"], "xl": XL}


def family_folder(kind: str, folder: Path) -> Path:
    """A diffusers folder: `sd1`, `sd2` (linear projections, velocity), `turbo` (the same, noise) or `xl`."""
    base_folder(folder, "v_prediction" if kind == "sd2" else "epsilon")
    parts: dict[str, Any] = StableDiffusionPipeline.from_pretrained(folder, requires_safety_checker=False).components
    parts["unet"] = image_unet(**UNETS[kind])
    torch.nn.init.normal_(parts["unet"].conv_out.weight, std=0.0005)  # as smooth as a trained model
    if kind != "xl":
        StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
        return folder
    own = parts["text_encoder"].config.to_dict()
    small, large = (CLIPTextConfig(**own | {"hidden_size": width, "projection_dim": 16, "num_hidden_layers": 2})
                    for width in (8, 16))  # fmt: skip
    parts |= {"text_encoder": CLIPTextModel(small).eval(), "text_encoder_2": CLIPTextModelWithProjection(large).eval()}
    parts |= {"tokenizer_2": parts["tokenizer"]}
    del parts["safety_checker"]
    StableDiffusionXLPipeline(**parts).save_pretrained(folder)
    return folder


def original(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """All tensors of a Stable Diffusion 1.x pipeline under the names of the original checkpoints."""
    unet = {_unet_name(name, pipe.unet.config): value for name, value in pipe.unet.state_dict().items()}
    last = len(pipe.vae.config.block_out_channels) - 1
    vae = dict(_vae_tensor(name, value, last) for name, value in pipe.vae.state_dict().items())
    text = {f"text_model.{name.removeprefix('text_model.')}": v for name, v in pipe.text_encoder.state_dict().items()}
    parts = {"model.diffusion_model.": unet, "first_stage_model.": vae, "cond_stage_model.transformer.": text}
    return {prefix + name: value.contiguous() for prefix, part in parts.items() for name, value in part.items()}


_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def _unet_name(name: str, config: Any) -> str:
    for ours, theirs in _ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    place, rest = _unet_place(name, config)
    if "resnets" in name:
        part, _, end = rest.partition(".")
        rest = f"{_RESNET[part]}.{end}"
    return f"{place}.{rest}"


def _unet_place(name: str, config: Any) -> tuple[str, str]:
    layers = config.layers_per_block
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, number, rest = found.groups()
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}", rest
    found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", name)
    assert found, name
    way, block, kind, layer, rest = found.groups()
    block, layer = int(block), int(layer)
    has_attention = "CrossAttn" in (config.down_block_types if way == "down" else config.up_block_types)[block]
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (layers + 1)}.0", rest.replace("conv", "op")
    if kind == "upsamplers":
        return f"output_blocks.{block * (layers + 1) + layers}.{1 + has_attention}", rest
    at = 1 + block * (layers + 1) + layer if way == "down" else block * (layers + 1) + layer
    return f"{'input' if way == 'down' else 'output'}_blocks.{at}.{int(kind == 'attentions')}", rest


def _vae_tensor(name: str, value: Tensor, last: int) -> tuple[str, Tensor]:
    name = re.sub(r"up_blocks\.(\d)\.", lambda found: f"up.{last - int(found[1])}.", name)
    for ours, theirs in {
        r"down_blocks\.": "down.", r"resnets\.": "block.", r"mid_block\.block\.0": "mid.block_1",
        r"mid_block\.block\.1": "mid.block_2", r"mid_block\.attentions\.0": "mid.attn_1", "group_norm": "norm",
        r"to_out\.0": "proj_out", "to_([qkv])": r"\1", "(down|up)samplers.0": r"\1sample", "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
    }.items():  # fmt: skip
        name = re.sub(ours, theirs, name)
    is_projection = "attn_1" in name and value.ndim == 2
    return name, value[:, :, None, None] if is_projection else value
