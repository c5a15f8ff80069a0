"""Base models as stock diffusers pipelines on a device."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import StableDiffusionXLPipeline

from tuneavideo.errors import ModelError
from tuneavideo.kernels import channels_last
from tuneavideo.method.inflate import inflate
from tuneavideo.models import loading
from tuneavideo.models.adapter import Adapter
from tuneavideo.models.loading import Pipeline
from tuneavideo.settings import Inflation


def load_pipeline(
    base: str,
    *,
    adapter: Adapter | Path | str | None = None,
    inflation: Inflation | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Pipeline:
    """Load a base as a stock diffusers pipeline whose UNet is inflated in place.

    Args:
        base: A name of the table of bases, a hub id, a diffusers folder or a single-file checkpoint.
        adapter: An `Adapter` or its folder, attached to the UNet.
        inflation: How to inflate the UNet when there is no adapter.
        device: By default the one that accelerate chooses.
        dtype: Precision of the weights; float32 by default.

    Returns:
        A `StableDiffusionPipeline` or `StableDiffusionXLPipeline`.

    Raises:
        ModelError: The base is missing (the message says what to download) or is not a Stable Diffusion model.
        AdapterError: The adapter belongs to another base.
    """
    pipe = load_image_pipeline(base, device=device, dtype=dtype)
    if adapter is None:
        inflate(pipe.unet, inflation)
    else:
        (adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)).attach(pipe.unet)
    return pipe


def load_image_pipeline(
    base: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> Pipeline:
    """Load a base as `load_pipeline` does, without inflating the UNet. Raises ModelError."""
    pipe = _stock_pipeline(base, dtype or torch.float32)
    if not isinstance(pipe, Pipeline) or pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ModelError(
            f"{base}: found a {type(pipe).__name__}; a Stable Diffusion 1.x, 2.x or XL text-to-image model is needed"
        )
    if isinstance(pipe, StableDiffusionXLPipeline) and pipe.vae.config.force_upcast and dtype == torch.float16:
        pipe.vae.to(dtype=torch.float32)  # its activations overflow in half precision
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device or PartialState().device)
    channels_last.optimise(pipe.unet)
    channels_last.optimise(pipe.vae)
    return pipe


_kept: dict[tuple[str, torch.dtype], Any] | None = None


@contextmanager
def keeping_base() -> Generator[None, None, None]:
    """Keep the last base that is loaded within the block in the computer's memory, and load it again from there."""
    global _kept
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def _stock_pipeline(base: str, dtype: torch.dtype) -> Any:
    """Load a base, or copy the one that is kept: jobs change the modules of theirs."""
    if _kept is None:
        return loading.load_stock_pipeline(base, dtype=dtype)
    if (base, dtype) not in _kept:
        _kept.clear()
        _kept[base, dtype] = loading.load_stock_pipeline(base, dtype=dtype)
    return copy.deepcopy(_kept[base, dtype])
