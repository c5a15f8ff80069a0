"""Memory of activations, measured on torch's meta device: shapes are real, values are not computed.

Workspaces of kernels and the allocator's waste are not included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tuneavideo.kernels import channels_last
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet, inflate, low_rank_parameters, trainable_parameters
from tuneavideo.settings import TuneSettings

HALF = {"device": "meta", "dtype": torch.bfloat16}
# Functions that autocast on a GPU computes in full and in half precision.
IN_FULL = (functional.group_norm, functional.layer_norm)
IN_HALF = (functional.linear, functional.conv2d, functional.scaled_dot_product_attention)


class _Attention(torch.autograd.Function):
    """Attention that saves what fused kernels save; on the meta device torch's own would save whole attention maps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


class _FusedAttention(TorchFunctionMode):
    """Fused attention and, with `casts`, the casts of autocast."""

    def __init__(self, casts: bool = False) -> None:
        super().__init__()
        self.casts = casts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.casts and func in IN_FULL + IN_HALF:
            dtype = torch.float32 if func in IN_FULL else torch.bfloat16
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(dtype), (args, kwargs))
        if func is functional.scaled_dot_product_attention:
            return _Attention.apply(*(args + tuple(kwargs.values()))[:3])
        return func(*args, **kwargs)


class Saved(saved_tensors_hooks):
    """Storages of tensors saved for the backward pass, except those of `weights`."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__(self.keep, lambda tensor: tensor)
        self.weights, self.storages = weights, dict[int, Any]()

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.storages[storage._cdata] = storage  # while it lives, no other has its number
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


class _Peak(TorchDispatchMode):
    """Most bytes of results, except `weights`, that are alive at the same time."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.sizes, self.now, self.bytes = dict.fromkeys(weights, 0), 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in (each.untyped_storage() for each in tree_leaves(result) if isinstance(each, Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.bytes = max(self.bytes, self.now)
        return result

    def _free(self, number: int) -> None:
        self.now -= self.sizes.pop(number)


def weights(model: torch.nn.Module) -> set[int]:
    return {parameter.untyped_storage()._cdata for parameter in model.parameters()}


def blank_unet(config: Any, settings: TuneSettings, by_kernels: bool = False) -> VideoUNet:
    """Make a UNet without values, inflated and ready to be tuned, on a GPU `by_kernels`."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    video = inflate(unet.to(torch.bfloat16).train(), settings.inflation)
    unet.requires_grad_(False)
    names = (settings.trainable_modules, settings.frozen_modules)
    if settings.lora_rank:
        chosen = low_rank_parameters(unet, *names, settings.lora_rank)
    else:
        chosen = trainable_parameters(unet, *names)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    if by_kernels:
        channels_last.replace_layers(unet)
    return video


def saved(
    video: VideoUNet, frames: int, height: int, width: int, checkpointing: bool, casts: bool = False, batch: int = 1
) -> int:
    """Measure the activations that a tuning step keeps at its peak, in bytes, in half precision.

    Args:
        video: See `blank_unet`.
        frames: Of a clip.
        height: In latents.
        width: In latents.
        checkpointing: With gradient checkpointing.
        casts: As autocast computes on a GPU, where norms take and save full precision.
        batch: Number of clips.
    """
    outer, peaks = Saved(weights(video.unet)), [0]

    def recompute(block: Callable[..., Any], *inputs: Any) -> Any:
        """Stand in for gradient checkpointing: keep a block's inputs, note what its recomputation will save."""
        for value in inputs:
            if isinstance(value, Tensor):
                outer.keep(value)
        with (inner := Saved(outer.weights)):
            result = block(*inputs)
        peaks.append(inner.bytes)
        return result

    if checkpointing:
        video.unet.enable_gradient_checkpointing(recompute)
    else:
        video.unet.disable_gradient_checkpointing()
    with outer:
        _predict(video, frames, height, width, batch, casts)
    return outer.bytes + max(peaks)


@torch.no_grad()
def predicted(video: VideoUNet, frames: int, height: int, width: int, batch: int = 1) -> int:
    """Measure the peak of activations in a prediction, in bytes, in half precision; sizes in latents."""
    video.unet.disable_gradient_checkpointing()
    with _Peak(weights(video.unet)) as peak:
        _predict(video, frames, height, width, batch)
    return peak.bytes


@torch.no_grad()
def decoded(config: Any, height: int, width: int) -> int:
    """Measure the peak of activations while one frame is decoded, in bytes, in half precision; sizes in latents."""
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(config)
    vae.to(torch.bfloat16)
    latents = torch.empty(1, vae.config.latent_channels, height, width, **HALF)
    with _FusedAttention(), _Peak(weights(vae)) as peak:
        vae.decode(latents)
    return peak.bytes


def _predict(video: VideoUNet, frames: int, height: int, width: int, batch: int, casts: bool = False) -> None:
    config: Any = video.unet.config
    latents = torch.empty(batch, config.in_channels, frames, height, width, **HALF)
    pooled = torch.empty(batch, 1280, **HALF) if config.addition_embed_type else None
    text = Conditions(torch.empty(batch, 77, config.cross_attention_dim, **HALF), pooled)
    with _FusedAttention(casts):
        video(latents, torch.tensor(1, device="meta"), text)
