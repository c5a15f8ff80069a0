"""Parts of the tests of inflation that others use."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from tuneavideo.method.inflate import added_parameters

SHAPES = {
    "sd1": {},
    "sd2": {"use_linear_projection": True, "attention_head_dim": (2, 4), "num_attention_heads": None},
    "xl": {
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 72,
    },
}


def randomised(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Temporal layers as after tuning: nothing at zero."""
    torch.manual_seed(5)
    for parameter in added_parameters(unet).values():
        torch.nn.init.normal_(parameter, std=0.2)
    return unet
