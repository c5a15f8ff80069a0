"""Tiny but real models, made once; one torch thread, no network, no cache of the user's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import settings
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tuneavideo.cli import main
from tuneavideo.method.inflate import inflate, trainable_parameters
from tuneavideo.models.adapter import Adapter, fingerprint
from tuneavideo.settings import Inflation
from tuneavideo.video import Video, write

Said = Callable[[list[str]], str]

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


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of the session, so that what modules make has it, too."""
    os.environ["TUNEAVIDEO_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(autouse=True)
def own_precision() -> None:
    """Not that of the test before, which accelerate keeps."""
    AcceleratorState._reset_state()


def image_unet(seed: int = 0, **changes) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**(TINY | changes)).eval()


def words(length: int = 12) -> CLIPTokenizer:
    """A tokenizer that knows a dozen words, and letters."""
    known = ["a", "red", "blue", "square", "circle", "moves", "jumps", "on", "the", "snow", "grass", "not"]
    vocab = [*"abcdefghijklmnopqrstuvwxyz", *(f"{word}</w>" for word in known), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(vocab)}, merges=[], model_max_length=length)


def base_folder(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A whole Stable Diffusion of random weights and 16 pixels, which knows a dozen words."""
    tokenizer = words()
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


def clip_folder(folder: Path, scale: float = 3.0) -> Path:
    """A CLIP of random weights and 32 pixels, with its tokenizer and image processor."""
    torch.manual_seed(2)
    tokenizer, small = words(), {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": tokenizer.eos_token_id}
    pictures = {"image_size": 32, "patch_size": 8, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(
        text_config={**small, **text, "num_attention_heads": 2}, vision_config=small | pictures, projection_dim=16,
        logit_scale_init_value=scale,
    ))  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


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


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Said:
    """The one line that a command is refused with."""

    def said(words: list[str], code: int = 2) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main.main(words)
        *_, line = [line for line in capsys.readouterr().err.splitlines() if "[transformers]" not in line]
        assert stopped.value.code == code
        assert line.startswith("tuneavideo: "), line
        return line.removeprefix("tuneavideo: ")

    return said


def adapter_on(base: Path, folder: Path) -> Path:
    """Write an adapter of a base, all of whose tuned layers differ from it."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    norms = fingerprint(unet)
    inflate(unet)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainable_parameters(unet, ("attn1.to_q", "attn2.to_q", "attn_temp")).values():
            parameter.add_(torch.randn_like(parameter) / 50)
    tuned = trainable_parameters(unet, ("attn1.to_q", "attn2.to_q"))
    made = Adapter.of(unet, tuned, inflation=Inflation(), base=str(base), fingerprint=norms)
    return made.save(folder, dtype=torch.float32)
