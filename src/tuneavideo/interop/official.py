"""The published code's own names and config, and those of a fork of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tuneavideo.interop.names import VAE

UNET_CLASS = "UNet3DConditionModel"  # not diffusers' class of that name
FORK = {"attn_temporal": "attn_temp", "norm_temporal": "norm_temp"}
# What diffusers 0.11, which the published code pins, calls the attention in the VAE.
OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
# The arguments of its UNet; it knows no others.
_ARGUMENTS = (
    "sample_size", "in_channels", "out_channels", "center_input_sample", "flip_sin_to_cos", "freq_shift",
    "down_block_types", "mid_block_type", "up_block_types", "only_cross_attention", "block_out_channels",
    "layers_per_block", "downsample_padding", "mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps",
    "cross_attention_dim", "attention_head_dim", "dual_cross_attention", "use_linear_projection", "class_embed_type",
    "num_class_embeds", "upcast_attention", "resnet_time_scale_shift",
)  # fmt: skip
_MIDDLE = {"UNetMidBlock2DCrossAttn": "UNetMidBlock3DCrossAttn"}


def image_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its UNet's config as that of the image UNet it grew from."""
    return _blocks(config, "3D", "2D") | {"_class_name": "UNet2DConditionModel"}


def video_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: an image UNet's config as its class takes it."""
    known = {name: config[name] for name in _ARGUMENTS if name in config}
    middle = {"mid_block_type": _MIDDLE[config.get("mid_block_type") or "UNetMidBlock2DCrossAttn"]}
    return {"_class_name": UNET_CLASS, "_diffusers_version": "0.11.1", **_blocks({**known, **middle}, "2D", "3D")}


def from_fork(name: str) -> str:
    """A fork's name of a temporal layer as ours."""
    parts = [FORK.get(part, part) for part in name.split(".")]
    return ".".join(parts)


def old_vae(name: str) -> str:
    """One of our names of the VAE's attention as diffusers 0.11 has it."""
    return _vae_attention(name, OLD_VAE)


def new_vae(name: str) -> str:
    """The inverse of `old_vae`."""
    return _vae_attention(name, {old: new for new, old in OLD_VAE.items()})


def _vae_attention(name: str, table: Mapping[str, str]) -> str:
    match = re.fullmatch(r"(.*\.mid_block\.attentions\.0)\.(.+)\.(weight|bias)", name)
    if not match or not name.startswith(VAE):
        return name
    return f"{match[1]}.{table.get(match[2], match[2])}.{match[3]}"


def _blocks(config: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return re.sub(rf"Block{old}|Block{old}CrossAttn", lambda match: match[0].replace(old, new), value)
        return value

    names = ("down_block_types", "up_block_types", "mid_block_type")
    return {
        key: ([changed(each) for each in value] if isinstance(value, list | tuple) else changed(value))
        if key in names
        else value
        for key, value in config.items()
    }
