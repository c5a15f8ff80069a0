"""Conversions between pixels and latents, and between prompts and text embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from einops import rearrange
from torch import Tensor

from tuneavideo.method.conditioning import Conditions
from tuneavideo.models.devices import free_and_total, unload
from tuneavideo.models.loading import Pipeline
from tuneavideo.video import AnyVideo, Video
from tuneavideo.video.masks import Mask

# Frames that a VAE takes at a time on a GPU, and free memory for each: four times what one of 768 x 768 needs.
MOST_AT_ONCE, FREE_A_FRAME = 6, 6 * 2**30


def default_size(pipe: Pipeline) -> int:
    """Return the side in pixels that the base was trained at; without one in its config 64 latents, as in diffusers."""
    return (pipe.unet.config.sample_size or 64) * stride(pipe)


def stride(pipe: Pipeline) -> int:
    """Return the pixels per latent along each side."""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def encode(pipe: Pipeline, video: AnyVideo) -> dict[str, Tensor]:
    """Encode a clip, one frame at a time, on a GPU a few.

    Returns:
        `mean` and `std` of the latents, each `1 C T H W`, scaled as the UNet expects them.
    """
    means, stds = zip(*encode_frames(pipe, video), strict=True)
    return {"mean": torch.stack(means, dim=2), "std": torch.stack(stds, dim=2)}


@torch.no_grad()
def encode_frames(pipe: Pipeline, video: AnyVideo) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield mean and standard deviation of each frame's latents, `1 C H W` each."""
    vae, device = pipe.vae, pipe._execution_device
    for frames in _batched(video.images, at_once(device)):
        images = [rearrange(torch.tensor(each, dtype=torch.float32) / 127.5 - 1, "h w c -> 1 c h w") for each in frames]
        pixels_NCHW = images[0] if len(images) == 1 else torch.cat(images)
        moments = vae.encode(pixels_NCHW.to(device, vae.dtype)).latent_dist
        means, stds = (x.float() * vae.config.scaling_factor for x in (moments.mean, moments.std))
        yield from zip(means.split(1), stds.split(1), strict=True)
    unload(vae)


def at_once(device: torch.device) -> int:
    """Return how many frames go through a VAE at a time: on a GPU as many as leave most of its free memory free."""
    return max(1, min(MOST_AT_ONCE, free_and_total(device)[0] // FREE_A_FRAME)) if device.type == "cuda" else 1


def latent_masks(masks: Sequence[Mask | None], latents: Tensor) -> Tensor | None:
    """Return the fraction of each edit's mask in each of the `latents` `1 C T H W`, as `B 1 T H W` on their device."""
    fractions = [torch.from_numpy(mask.fractions(*latents.shape[3:])) for mask in masks if mask]
    return torch.stack(fractions)[:, None].to(latents.device) if fractions else None


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


def decode(pipe: Pipeline, latents_BCTHW: Tensor, fps: float, masks: Sequence[Mask | None] = ()) -> list[Video]:
    """Decode latents to one clip per entry of the batch, frame by frame; see `decode_frames` for their masks."""
    pairs = zip_longest(latents_BCTHW.split(1), masks)
    return [Video(np.stack(list(decode_frames(pipe, latents, mask))), fps) for latents, mask in pairs]


def decode_frames(pipe: Pipeline, latents_1CTHW: Tensor, mask: Mask | None = None) -> Iterator[np.ndarray]:
    """Decode a clip; yields frames, uint8 `H W C`. Outside a mask they are those of its source."""
    for pixels_CHW in decode_pixels(pipe, latents_1CTHW, mask):
        yield rearrange((pixels_CHW * 255).round().to(torch.uint8), "c h w -> h w c").numpy()


def decode_pixels(pipe: Pipeline, latents_1CTHW: Tensor, mask: Mask | None = None) -> Iterator[Tensor]:
    """Decode a clip; yields frames `C H W` in 0..1, float32 on the CPU.

    Outside a mask they are those of its source, which fade into the edit over the width of a latent inside.
    """
    frames = _decode(pipe, latents_1CTHW)
    if mask is None:
        yield from frames
        return
    for pixels_CHW, image_HWC, weight_HW in zip(frames, mask.source.images, mask.weights(stride(pipe)), strict=True):
        source_CHW = rearrange(torch.tensor(image_HWC, dtype=torch.float32) / 255, "h w c -> c h w")
        yield source_CHW.lerp(pixels_CHW, torch.from_numpy(weight_HW))


@torch.no_grad()
def _decode(pipe: Pipeline, latents_1CTHW: Tensor) -> Iterator[Tensor]:
    vae, device = pipe.vae, pipe._execution_device
    for numbers in _batched(range(latents_1CTHW.shape[2]), at_once(device)):
        frames = [latents_1CTHW[:, :, [number]][:, :, 0] for number in numbers]
        latents_NCHW = (frames[0] if len(frames) == 1 else torch.cat(frames)) / vae.config.scaling_factor
        pixels_NCHW = vae.decode(latents_NCHW.to(device, vae.dtype)).sample.float()
        yield from (pixels_NCHW / 2 + 0.5).clamp(0, 1).cpu()
    unload(vae)


@torch.no_grad()
def embed(pipe: Pipeline, prompts: list[str]) -> Conditions:
    """Encode prompts, cut to the text encoder's length; Stable Diffusion XL was trained with zeros as empty prompt."""
    device = pipe._execution_device
    if not isinstance(pipe, StableDiffusionXLPipeline):
        text = Conditions(pipe.encode_prompt(prompts, device, 1, False)[0])
        unload(pipe.text_encoder)
        return text
    xl: Any = pipe  # diffusers' annotations know one prompt only
    text, _, pooled, _ = xl.encode_prompt(prompts, None, device, 1, False)
    unload(xl.text_encoder)
    unload(xl.text_encoder_2)
    not_empty = torch.tensor([bool(prompt) for prompt in prompts], device=text.device)
    if xl.config.force_zeros_for_empty_prompt:
        text, pooled = text * not_empty[:, None, None], pooled * not_empty[:, None]
    return Conditions(text, pooled, stride=stride(pipe))


def truncated_words(pipe: Pipeline, prompt: str) -> str:
    """Return the words at the end of a prompt that exceed the text encoder's length; empty if none do."""
    places = pipe.tokenizer(prompt, return_offsets_mapping=True, verbose=False).offset_mapping
    most = pipe.tokenizer.model_max_length
    if len(places) <= most:
        return ""
    first = places[most - 1][0]
    return prompt[prompt.rfind(" ", 0, first + 1) + 1 :]
