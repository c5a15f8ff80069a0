"""Parts of the tests of style that others use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.conftest import image_unet

PROMPT = "a <mine> circle"


Files = dict[str, dict[str, Any]]


def lora(folder: Path) -> dict[str, torch.Tensor]:
    """A style LoRA of rank 2, in diffusers' format in `folder` and as tensors by peft's names."""
    torch.manual_seed(2)
    donor = image_unet()
    donor.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    tensors = get_peft_model_state_dict(donor)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=tensors)
    return tensors


def kohya(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same LoRA by kohya's names."""
    named = {}
    for name, value in tensors.items():
        layer, part, _ = name.rsplit(".", 2)
        layer = "lora_unet_" + layer.replace(".", "_")
        named[f"{layer}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = value
        named[f"{layer}.alpha"] = torch.tensor(2.0)
    return named


def controlnet(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(3)
    net = ControlNetModel.from_unet(image_unet(**changes), conditioning_embedding_out_channels=(4, 8))
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(layer.weight, std=0.2)
    net.save_pretrained(folder)
    return folder


def ip_adapter(folder: Path) -> Path:
    """An IP-Adapter's file beside its image encoder."""
    torch.manual_seed(4)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                              image_size=16, patch_size=8, projection_dim=12)  # fmt: skip
    CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    widths = [layer.to_k.weight.shape[0] for name, layer in image_unet().named_modules() if name.endswith("attn2")]
    tensors = {f"ip_adapter.{1 + 2 * i}.to_{x}_ip.weight": torch.randn(width, 24)
               for i, width in enumerate(widths) for x in "kv"}  # fmt: skip
    tensors |= {"image_proj.proj.weight": torch.randn(4 * 24, 12), "image_proj.proj.bias": torch.randn(4 * 24)}
    tensors |= {"image_proj.norm.weight": torch.ones(24), "image_proj.norm.bias": torch.zeros(24)}
    save_file(tensors, folder / "ip-adapter.safetensors")
    return folder / "ip-adapter.safetensors"


def style_files(folder: Path) -> Files:
    """Settings of each kind of style, with their files."""
    save_file(kohya(lora(folder / "lora")), folder / "kohya.safetensors")
    save_file({"<mine>": 3 * torch.randn(24)}, folder / "mine.safetensors")
    torch.save({"string_to_param": {"*": 3 * torch.randn(2, 24)}, "name": "other"}, folder / "<mine>.pt")
    (folder / "ip").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)).save(folder / "picture.png")
    return {
        "lora": {"lora": (str(folder / "lora/pytorch_lora_weights.safetensors"),)},
        "kohya": {"lora": (str(folder / "kohya.safetensors"),)},
        "embedding": {"embedding": (str(folder / "mine.safetensors"),)},
        "embedding of another tool": {"embedding": (str(folder / "<mine>.pt"),)},
        "controlnet": {"controlnet": str(controlnet(folder / "controlnet"))},
        "picture": {"ip_adapter": str(ip_adapter(folder / "ip")), "ip_image": str(folder / "picture.png")},
    }
