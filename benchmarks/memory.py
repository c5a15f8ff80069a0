"""What tuning Stable Diffusion has to hold in memory, counted without a GPU; writes benchmarks/results/memory.json.

    python -m benchmarks.memory

Counted on torch's meta device, in bf16: weights, gradients and Adam's moments, and the tensors that autograd saves. Not
counted: what a kernel needs while it runs, casts of autocast, and what the allocator wastes. A lower bound, therefore.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tuneavideo import attention
from tuneavideo.adapter import tuned_parameters
from tuneavideo.bases import BASES, Base
from tuneavideo.conditions import Conditions
from tuneavideo.inflate import VideoUNet, inflate
from tuneavideo.opening import CONFIGS, FAMILIES
from tuneavideo.settings import TuneSettings

RESULTS = Path(__file__).parent / "results" / "memory.json"
FRAMES = (4, 8, 12, 16, 24)


class Attention(torch.autograd.Function):
    """Saves what the fast kernels save; torch's meta device would keep whole attention maps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    return Attention.apply(q, k, v)


class Saved:
    """Tensors saved for the backward pass, each storage counted once."""

    def __init__(self) -> None:
        self.storages: dict[int, Any] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = storage  # held, so that its number is not given to another
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        with saved_tensors_hooks(self.keep, lambda tensor: tensor):
            yield


def checkpointed(outer: Saved, peak: list[int]) -> Callable[..., Any]:
    """Stands in for checkpointing: keeps a block's inputs, notes how much its recomputation will save."""

    def run(block: Callable[..., Any], *inputs: Any) -> Any:
        inner = Saved()
        for value in inputs:
            if isinstance(value, Tensor):
                outer.keep(value)
        with inner.counting():
            result = block(*inputs)
        peak.append(inner.bytes)
        return result

    return run


def activations(video: VideoUNet, frames: int, side: int, checkpointing: bool) -> int:
    """Bytes of activations at the worst moment of a step with one clip of `side` x `side` latents."""
    saved, peak = Saved(), [0]
    if checkpointing:
        video.unet._set_gradient_checkpointing(True, checkpointed(saved, peak))
    else:
        video.unet.disable_gradient_checkpointing()
    like = {"device": "meta", "dtype": torch.bfloat16}
    pooled = torch.empty(1, 1280, **like) if video.unet.config.addition_embed_type else None
    told = Conditions(torch.empty(1, 77, video.unet.config.cross_attention_dim, **like), pooled)
    with saved.counting():
        video(torch.empty(1, 4, frames, side, side, **like), torch.tensor(1, device="meta"), told)
    return saved.bytes + max(peak)


def weights(folder: Path) -> int:
    """Parameters of a family's autoencoder and text encoders."""
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    encoders = [kind(kind.config_class.from_pretrained(folder / name))
                for name, kind in kinds.items() if (folder / name).is_dir()]  # fmt: skip
    autoencoder = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    return sum(parameter.numel() for model in (autoencoder, *encoders) for parameter in model.parameters())


class Family:
    """Models of one shape, on the meta device, inflated and ready to be tuned."""

    def __init__(self, name: str) -> None:
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / name / "unet"))
            rest = 2 * weights(CONFIGS / name)
        self.video = inflate(unet.to(torch.bfloat16).train())
        unet.requires_grad_(False)
        chosen = tuned_parameters(unet, TuneSettings.model_fields["trainable_modules"].default)
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        self.learned = sum(parameter.numel() for parameter in chosen.values())
        frozen = sum(parameter.numel() for parameter in unet.parameters()) - self.learned
        self.fixed = 2 * frozen + 4 * 4 * self.learned + rest  # weight, gradient and two moments in float32

    def gb(self, frames: int, side: int, checkpointing: bool) -> float:
        return round((self.fixed + activations(self.video, frames, side, checkpointing)) / 1e9, 1)


def main() -> None:
    torch.nn.functional.scaled_dot_product_attention = attention.scaled_dot_product_attention = attend
    families = {name: Family(name) for name in FAMILIES.values()}
    sd1 = families["sd1"]
    rows = {
        frames: {"checkpointing_gb": sd1.gb(frames, 64, True), "plain_gb": sd1.gb(frames, 64, False)}
        for frames in FRAMES
    }
    bases = {name: families[base.family].gb(frames_of(base), base.settings["resolution"] // 8, True)
             for name, base in BASES.items() if base.family}  # fmt: skip
    fixed = round(sd1.fixed / 1e9, 1)
    result = {"what": "lower bound, SD1.5 512x512 bf16, batch 1", "learned": sd1.learned, "fixed_gb": fixed}
    result |= {"frames": rows, "bases_gb": bases}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def frames_of(base: Base) -> int:
    return base.settings.get("num_frames", TuneSettings.model_fields["num_frames"].default)


if __name__ == "__main__":
    main()
