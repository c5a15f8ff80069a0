"""Opens a base: a stock diffusers pipeline. Device and precision are decided here and nowhere below."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import PartialState, cpu_offload_with_hook
from accelerate.hooks import CpuOffload
from diffusers import StableDiffusionXLPipeline
from einops import rearrange
from torch import Tensor

from tuneavideo import machine, opening, products
from tuneavideo.adapter import Adapter
from tuneavideo.conditions import Conditions
from tuneavideo.errors import ModelError, SettingsError
from tuneavideo.inflate import inflate
from tuneavideo.opening import Pipeline
from tuneavideo.reels import Reel
from tuneavideo.settings import Inflation
from tuneavideo.video import Spool, Video

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precision(wish: str | None, *, low: bool = False) -> str:
    """`no`, `fp16` or `bf16`: as wished, or bf16 on a device that computes in it and full precision elsewhere.

    Where memory is `low`, a GPU that has no bf16 takes fp16.
    """
    if wish == "fp16" and not torch.accelerator.is_available():
        raise SettingsError("mixed_precision fp16 needs a GPU; take bf16, or no")
    if wish is not None:
        return wish
    if torch.cuda.is_available():
        computes = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if computes else "fp16" if low else "no"
    return "bf16" if has_bf16() and not torch.accelerator.is_available() else "no"


def has_bf16() -> bool:
    """Whether this CPU has instructions for bf16; without them it is slower than float32."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def open(
    base: str,
    *,
    adapter: Adapter | Path | str | None = None,
    inflation: Inflation | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Pipeline:
    """Open a base as a stock diffusers pipeline whose UNet is inflated in place.

    Args:
        base: A name of the table of bases, a hub id, a diffusers folder or a single-file checkpoint.
        adapter: What a run learned (an `Adapter` or its folder), attached to the UNet.
        inflation: How to inflate the UNet when there is no adapter.
        device: Where to put it; by default what accelerate finds.
        dtype: Precision of the weights; float32 by default.

    Raises:
        ModelError: The base is not there (the message says what to download) or is no Stable Diffusion model.
        AdapterError: The adapter belongs to another base.
    """
    pipe = open_image_model(base, device=device, dtype=dtype)
    if adapter is None:
        inflate(pipe.unet, inflation)
    else:
        (adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)).attach(pipe.unet)
    return pipe


def open_image_model(
    base: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Pipeline:
    """Like `open`, with the UNet still an image UNet."""
    pipe = opening.opened(base, dtype=dtype or torch.float32)
    if not isinstance(pipe, Pipeline) or pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ModelError(
            f"{base}: found a {type(pipe).__name__}; a Stable Diffusion 1.x, 2.x or XL text-to-image model is needed"
        )
    if isinstance(pipe, StableDiffusionXLPipeline) and pipe.vae.config.force_upcast and dtype == torch.float16:
        pipe.vae.to(dtype=torch.float32)  # its activations are beyond what half precision holds
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device or PartialState().device)
    products.lay_out(pipe.unet)
    return pipe


def default_size(pipe: Pipeline) -> int:
    """Side in pixels that the base was trained at."""
    return pipe.unet.config.sample_size * stride(pipe)


def stride(pipe: Pipeline) -> int:
    """Pixels per latent along each side."""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def encode(pipe: Pipeline, video: Video) -> dict[str, Tensor]:
    """Moments of the clip's latents: `mean` and `std`, each `1 C T H W`, scaled as the UNet expects them.

    Frames go through the VAE one by one, so memory does not grow with the clip.
    """
    means, stds = zip(*encoded(pipe, video), strict=True)
    return {"mean": torch.stack(means, dim=2), "std": torch.stack(stds, dim=2)}


def offload(pipe: Pipeline) -> None:
    """Keep VAE and text encoder in the computer's memory but for the moments in which they work."""
    device = pipe._execution_device
    for part in (pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            cpu_offload_with_hook(part, device)


def _rest(part: Any) -> None:
    """Put a part that is offloaded away again."""
    if isinstance(getattr(part, "_hf_hook", None), CpuOffload):
        part.to("cpu")


@torch.no_grad()
def encoded(pipe: Pipeline, video: Video | Spool) -> Iterator[tuple[Tensor, Tensor]]:
    """Mean and standard deviation of each frame's latents, `1 C H W`."""
    vae, device = pipe.vae, pipe._execution_device
    for frame_HWC in video.images:
        pixels = torch.tensor(frame_HWC, dtype=torch.float32) / 127.5 - 1
        moments = vae.encode(rearrange(pixels, "h w c -> 1 c h w").to(device, vae.dtype)).latent_dist
        yield moments.mean.float() * vae.config.scaling_factor, moments.std.float() * vae.config.scaling_factor
    _rest(vae)


def decode(pipe: Pipeline, latents_BCTHW: Tensor, fps: float) -> list[Video]:
    """Latents to clips, one per entry of the batch, frame by frame."""
    return [Video(np.stack(list(decoded(pipe, latents[None]))), fps) for latents in latents_BCTHW]


def decoded(pipe: Pipeline, latents_1CTHW: Tensor | Reel) -> Iterator[np.ndarray]:
    """The frames of a clip's latents, uint8 `H W C`, one at a time."""
    for pixels_CHW in pictures(pipe, latents_1CTHW):
        yield rearrange((pixels_CHW * 255).round().to(torch.uint8), "c h w -> h w c").numpy()


@torch.no_grad()
def pictures(pipe: Pipeline, latents_1CTHW: Tensor | Reel) -> Iterator[Tensor]:
    """The frames of a clip's latents, `C H W` in 0..1 on the CPU, one at a time and not rounded."""
    vae, device = pipe.vae, pipe._execution_device
    for number in range(latents_1CTHW.shape[2]):
        latents_NCHW = latents_1CTHW[:, :, [number]][:, :, 0] / vae.config.scaling_factor
        pixels_CHW = vae.decode(latents_NCHW.to(device, vae.dtype)).sample[0].float()
        yield (pixels_CHW / 2 + 0.5).clamp(0, 1).cpu()
    _rest(vae)


@torch.no_grad()
def embed(pipe: Pipeline, prompts: list[str]) -> Conditions:
    """Text conditions of prompts, without what is `cut`; Stable Diffusion XL learned the empty prompt as zeros."""
    device = pipe._execution_device
    if not isinstance(pipe, StableDiffusionXLPipeline):
        told = Conditions(pipe.encode_prompt(prompts, device, 1, False)[0])
        _rest(pipe.text_encoder)
        return told
    xl: Any = pipe  # diffusers' annotations know one prompt only
    text, _, pooled, _ = xl.encode_prompt(prompts, None, device, 1, False)
    _rest(xl.text_encoder)
    _rest(xl.text_encoder_2)
    told = torch.tensor([bool(prompt) for prompt in prompts], device=text.device)
    if xl.config.force_zeros_for_empty_prompt:
        text, pooled = text * told[:, None, None], pooled * told[:, None]
    return Conditions(text, pooled, stride=stride(pipe))


def cut(pipe: Pipeline, prompt: str) -> str:
    """The words at the end of a prompt that the text encoder does not take whole; empty if it takes all."""
    places = pipe.tokenizer(prompt, return_offsets_mapping=True, verbose=False).offset_mapping
    most = pipe.tokenizer.model_max_length
    if len(places) <= most:
        return ""
    first = places[most - 1][0]
    return prompt[prompt.rfind(" ", 0, first + 1) + 1 :]


def memory(device: torch.device) -> int:
    """Bytes in use: the most a GPU has held so far, or what this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def memory_left(device: torch.device) -> tuple[int, int]:
    """Free and whole memory of a device, in bytes."""
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else machine.memory()


def memory_to_take(device: torch.device) -> int:
    """Bytes that a job on a GPU may take: what is free, and what this process has of it already."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in one of the ways that torch, numpy and the system have, that memory is at its end."""
    told = ("out of memory", "not enough memory", "allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in told)
