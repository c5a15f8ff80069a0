"""What tuning Stable Diffusion 1.5 has to hold in memory, counted without a GPU; writes benchmarks/results/memory.json.

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
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tuneavideo import attention
from tuneavideo.adapter import tuned_parameters
from tuneavideo.inflate import VideoUNet, inflate
from tuneavideo.settings import TuneSettings

RESULTS = Path(__file__).parent / "results" / "memory.json"
FRAMES = (4, 8, 12, 16, 24)
VAE_AND_TEXT = 2 * (83_653_863 + 123_060_480)  # parameters of the published models, in bytes of bf16


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


def activations(video: VideoUNet, frames: int, checkpointing: bool) -> int:
    """Bytes of activations at the worst moment of a step with one clip of 512 x 512."""
    saved, peak = Saved(), [0]
    if checkpointing:
        video.unet._set_gradient_checkpointing(True, checkpointed(saved, peak))
    else:
        video.unet.disable_gradient_checkpointing()
    like = {"device": "meta", "dtype": torch.bfloat16}
    with saved.counting():
        video(
            torch.empty(1, 4, frames, 64, 64, **like), torch.tensor(1, device="meta"), torch.empty(1, 77, 768, **like)
        )
    return saved.bytes + max(peak)


def main() -> None:
    torch.nn.functional.scaled_dot_product_attention = attention.scaled_dot_product_attention = attend
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    video = inflate(unet.to(torch.bfloat16).train())
    unet.requires_grad_(False)
    chosen = tuned_parameters(unet, TuneSettings.model_fields["trainable_modules"].default)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    learned = sum(parameter.numel() for parameter in chosen.values())
    frozen = sum(parameter.numel() for parameter in unet.parameters()) - learned
    fixed = 2 * frozen + 4 * 4 * learned + VAE_AND_TEXT  # weight, gradient and two moments in float32
    rows = {
        frames: {
            "checkpointing_gb": round((fixed + activations(video, frames, True)) / 1e9, 1),
            "plain_gb": round((fixed + activations(video, frames, False)) / 1e9, 1),
        }
        for frames in FRAMES
    }
    result = {"what": "lower bound, SD1.5 512x512 bf16, batch 1", "learned": learned, "fixed_gb": round(fixed / 1e9, 1)}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result | {"frames": rows}, indent=1) + "\n")
    print(json.dumps(result | {"frames": rows}, indent=1))


if __name__ == "__main__":
    main()
