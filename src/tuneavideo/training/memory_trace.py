"""Memory that a UNet or VAE needs, counted on torch's meta device: shapes are real, numbers are not computed.

Not counted: what a kernel needs while it runs, and what the allocator wastes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet, inflate, low_rank_parameters, trainable_parameters
from tuneavideo.settings import Inflation


class _Attend(torch.autograd.Function):
    """Saves what the fast kernels save; torch's meta device would keep whole attention maps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


# What autocast on a GPU computes, and so keeps, in full precision, and what in half.
FULL = (functional.group_norm, functional.layer_norm)
HALF = (functional.linear, functional.conv2d, functional.scaled_dot_product_attention)


class _FastAttention(TorchFunctionMode):
    """Fast kernels of attention, and autocast's casts, if there are any."""

    def __init__(self, casts: bool = False) -> None:
        super().__init__()
        self.casts = casts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.casts and func in FULL + HALF:
            dtype = torch.float32 if func in FULL else torch.bfloat16
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(dtype), (args, kwargs))
        if func is functional.scaled_dot_product_attention:
            return _Attend.apply(*(args + tuple(kwargs.values()))[:3])
        return func(*args, **kwargs)


class _Saved:
    """Tensors saved for the backward pass, each storage counted once; weights, turned or not, are not."""

    def __init__(self, weights: set[int]) -> None:
        self.storages: dict[int, Any] = {}
        self.weights = weights

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.storages[storage._cdata] = storage  # held, so that its number is not given to another
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        with saved_tensors_hooks(self.keep, lambda tensor: tensor):
            yield


class _Live(TorchDispatchMode):
    """The most bytes of results, but weights, that are alive at once."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.sizes = dict.fromkeys(weights, 0)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._born(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _born(self, storage: Any) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._dead, storage._cdata)

    def _dead(self, number: int) -> None:
        self.now -= self.sizes.pop(number)


def _weights(model: torch.nn.Module) -> set[int]:
    return {parameter.untyped_storage()._cdata for parameter in model.parameters()}


def blank_unet(
    config: Any, trainable: tuple[str, ...], frozen: tuple[str, ...], inflation: Inflation, rank: int | None = None
) -> VideoUNet:
    """A UNet without numbers, ready to be tuned."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config)
    video = inflate(unet.to(torch.bfloat16).train(), inflation)
    unet.requires_grad_(False)
    if rank:
        chosen = low_rank_parameters(unet, trainable, frozen, rank)
    else:
        chosen = trainable_parameters(unet, trainable, frozen)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return video


def saved(
    video: VideoUNet, frames: int, height: int, width: int, checkpointing: bool, casts: bool = False, batch: int = 1
) -> int:
    """Bytes of activations at the worst moment of a tuning step, for latents of this size, in half precision.

    With `casts` as autocast computes on a GPU, whose norms are in full precision and keep what they are given so.
    """
    weights = _weights(video.unet)
    outer, inner = _Saved(weights), [0]
    if checkpointing:
        video.unet.enable_gradient_checkpointing(_checkpointed(outer, inner))
    else:
        video.unet.disable_gradient_checkpointing()
    with outer.counting():
        _called(video, frames, height, width, batch, casts)
    return outer.bytes + max(inner)


def _checkpointed(outer: _Saved, peaks: list[int]) -> Callable[..., Any]:
    """Stands in for checkpointing: keeps a block's inputs, notes how much its recomputation will save."""

    def run(block: Callable[..., Any], *inputs: Any) -> Any:
        inner = _Saved(outer.weights)
        for value in inputs:
            if isinstance(value, Tensor):
                outer.keep(value)
        with inner.counting():
            result = block(*inputs)
        peaks.append(inner.bytes)
        return result

    return run


@torch.no_grad()
def seen(video: VideoUNet, frames: int, height: int, width: int, batch: int = 1) -> int:
    """Bytes of activations at the worst moment of a prediction, in half precision."""
    video.unet.disable_gradient_checkpointing()
    with _Live(_weights(video.unet)) as live:
        _called(video, frames, height, width, batch)
    return live.peak


@torch.no_grad()
def painted(config: Any, height: int, width: int) -> int:
    """Bytes of activations at the worst moment of decoding one frame of this size in latents, in half precision."""
    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(config)
    latents = torch.empty(1, vae.config.latent_channels, height, width, device="meta", dtype=torch.bfloat16)
    vae.to(torch.bfloat16)
    with _FastAttention(), _Live(_weights(vae)) as live:
        vae.decode(latents)
    return live.peak


def _called(video: VideoUNet, frames: int, height: int, width: int, batch: int, casts: bool = False) -> None:
    config: Any = video.unet.config
    like = {"device": "meta", "dtype": torch.bfloat16}
    latents = torch.empty(batch, config.in_channels, frames, height, width, **like)
    pooled = torch.empty(batch, 1280, **like) if config.addition_embed_type else None
    text = Conditions(torch.empty(batch, 77, config.cross_attention_dim, **like), pooled)
    with _FastAttention(casts):
        video(latents, torch.tensor(1, device="meta"), text)
