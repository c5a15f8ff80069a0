"""Comparison of text encoder and VAE of the recorded pipeline."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import StableDiffusionPipeline
from einops import rearrange
from torch import Tensor

from benchmarks.parity.compare import DDIM, FORWARD, LAYER, Difference, absolute, relative, same
from benchmarks.parity.golden import Golden, Place
from tuneavideo.models import codec

GREY = 0.5 / 255  # half a grey level: all that saving may change


def text(place: Place, golden: Golden) -> Iterator[Difference]:
    prompts = golden.about["prompts"]
    yield from embedded(place.pipe, prompts, golden["input_ids"], golden["last_hidden_state_f32"])


def embedded(pipe: StableDiffusionPipeline, prompts: list[str], ids: Tensor, embedding: Tensor) -> Iterator[Difference]:
    """Compare token ids and embeddings of prompts."""
    length = {"padding": "max_length", "max_length": pipe.tokenizer.model_max_length, "truncation": True}
    yield same("tokens", pipe.tokenizer(prompts, **length).input_ids, ids.tolist())
    yield absolute("embedding", codec.embed(pipe, prompts).text_BLD, embedding, LAYER)


@torch.no_grad()
def vae(place: Place, golden: Golden) -> Iterator[Difference]:
    moments = place.pipe.vae.encode(golden["pixels"]).latent_dist
    for name in ("mean", "logvar", "std"):
        yield absolute(name, getattr(moments, name), golden[name], FORWARD)
    yield absolute("decoded", place.pipe.vae.decode(golden["z"]).sample, golden["decoded"], FORWARD)


@torch.no_grad()
def decoded(name: str, pipe: StableDiffusionPipeline, latents: Tensor, clip: Tensor) -> Iterator[Difference]:
    """Compare decoded pixels `B C T H W` in 0..1, in floats and rounded to bytes."""
    x_NCHW = rearrange(latents / pipe.vae.config.scaling_factor, "b c t h w -> (b t) c h w")
    pixels = (pipe.vae.decode(x_NCHW).sample / 2 + 0.5).clamp(0, 1)
    yield relative(name, rearrange(pixels, "(b t) c h w -> b c t h w", b=len(latents)), clip, DDIM)
    edits = torch.stack([torch.from_numpy(edit.frames_THWC) for edit in codec.decode(pipe, latents, fps=8)])
    levels_BCTHW = rearrange(edits, "b t h w c -> b c t h w") / 255
    nearest = clip.cpu().clamp(levels_BCTHW - GREY, levels_BCTHW + GREY)
    yield relative(f"{name}, as bytes", nearest, clip, DDIM)
