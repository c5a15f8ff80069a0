"""Tiny but real models, made once; one torch thread, no network, no cache of the user's."""

from __future__ import annotations

import os
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import settings
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tuneavideo.video import Video, write

torch.set_num_threads(1)
settings.register_profile("busy", deadline=None)  # other work on the same cores is no failure
settings.load_profile("busy")

TINY = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEAVIDEO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def image_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**(TINY | changes)).eval()


def base_folder(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A whole Stable Diffusion of random weights and 16 pixels, which knows a dozen words."""
    words = ["a", "red", "blue", "square", "circle", "moves", "jumps", "on", "the", "snow", "grass", "not"]
    vocab = [*"abcdefghijklmnopqrstuvwxyz", *(f"{word}</w>" for word in words), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(vocab)}, merges=[], model_max_length=12)
    torch.manual_seed(1)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, projection_dim=24,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, sample_size=16, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=image_unet(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base"))


def moving_square(path: Path) -> Path:
    """A clip of six frames, in which a square moves to the right."""
    frames = np.full((6, 32, 32, 3), 200, np.uint8)
    for t in range(6):
        frames[t, 10:18, 2 + 4 * t : 10 + 4 * t] = (200, 30, 30)
    write(Video(frames, 8.0), path)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return moving_square(tmp_path / "square.mp4")
