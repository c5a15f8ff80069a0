"""Models of the published sizes with random weights, on which speed does not depend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from tuneavideo import miniature

_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_XL = {
    "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "down_block_types": (_PLAIN, _CROSS, _CROSS), "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_TEXT = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
_TEXT_2 = {"vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}


@dataclass(frozen=True)
class Size:
    """Configs of a base's parts, as published; `text` is None where the second text encoder is left out (XL)."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any] = field(default_factory=lambda: _VAE)
    text: Mapping[str, Any] | None = field(default_factory=lambda: _TEXT | {"num_attention_heads": 12})
    words: int = 77


SIZES = {
    "sd15": Size({"cross_attention_dim": 768, "attention_head_dim": 8}),
    "sd21": Size(
        {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
        text=_TEXT_2 | {"num_attention_heads": 16, "hidden_act": "gelu"},
    ),
    "xl": Size(_XL, text=None),
    "tiny": Size(
        {"block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 24, "attention_head_dim": 4,
         "down_block_types": (_CROSS, _PLAIN), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
         "norm_num_groups": 8},
        _VAE | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "layers_per_block": 1},
        {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2},
    ),
}  # fmt: skip
MINIATURE = "miniature"
NAMES = (*SIZES, MINIATURE)


@dataclass(frozen=True)
class Parts:
    """A base's networks; `text` may be missing."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: CLIPTextModel | None
    words: int

    @property
    def stride(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def pooled(self, clips: int, device: str) -> Tensor | None:
        """Return the pooled text embedding that Stable Diffusion XL takes."""
        return None if self.unet.config.addition_embed_type is None else torch.zeros(clips, 1280, device=device)


def parts(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Parts:
    """Make the networks of a size on `device`, which may be `meta` for counting."""
    if name == MINIATURE and device != "meta":
        unet = UNet2DConditionModel.from_pretrained(miniature.MODEL / "unet")
        vae = AutoencoderKL.from_pretrained(miniature.MODEL / "vae")
        text = CLIPTextModel.from_pretrained(miniature.MODEL / "text_encoder")
        words = int(text.config.max_position_embeddings)
    else:
        with torch.device("meta"):
            unet, vae, text, words = _described(name)
    for part in (unet, vae, text):
        if part is not None:
            filled(part, device)
            nn.Module.to(part, device, dtype).eval()
    return Parts(unet, vae, text, words)


def _described(name: str) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel | None, int]:
    if name == MINIATURE:
        configs = [kind.load_config(miniature.MODEL / part) for kind, part in _STORED]
        text = CLIPTextConfig.from_pretrained(miniature.MODEL / "text_encoder")
        return (
            UNet2DConditionModel.from_config(configs[0]), AutoencoderKL.from_config(configs[1]),
            CLIPTextModel(text), int(text.max_position_embeddings),
        )  # fmt: skip
    size = SIZES[name]
    text = size.text and CLIPTextModel(CLIPTextConfig(**size.text, max_position_embeddings=size.words))
    return UNet2DConditionModel(**size.unet), AutoencoderKL(**size.vae), text, size.words


_STORED = ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))


@torch.no_grad()
def filled(network: nn.Module, device: str) -> nn.Module:
    """Allocate a network of the meta device on `device`, with weights of the scale of torch's defaults."""
    described = any(parameter.is_meta for parameter in network.parameters())
    if described and device != "meta":
        network.to_empty(device=device)
        numbers = torch.empty(2**20, device=device).uniform_(-1, 1)  # repeated: drawing 900 million takes long
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                width = tensor[0].numel() if tensor.ndim > 1 else 1
                drawn = numbers.repeat(-(-tensor.numel() // len(numbers)))[: tensor.numel()]
                tensor.copy_(drawn.view(tensor.shape) * width**-0.5)
        if hasattr(network, "text_model") or isinstance(network, CLIPTextModel):
            _number_positions(network)
    return network


def _number_positions(network: nn.Module) -> None:
    """Set the position ids, a buffer that is not saved with the weights."""
    for name, buffer in network.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
