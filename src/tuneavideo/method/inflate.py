"""Inflation of an image UNet to a video UNet, in place, and back.

Layers of a `UNet2DConditionModel` change their class, and every transformer block gains `norm_temp` and `attn_temp`. No
module is wrapped and no weight is renamed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange
from peft import LoraConfig
from torch import Tensor, nn

from tuneavideo.errors import ModelError, SettingsError
from tuneavideo.method.attention import (
    ClipGroupNorm,
    ClipLayout,
    SparseCausalAttention,
    TemporalAttention,
    TextAttention,
    VideoBlock,
)
from tuneavideo.method.conditioning import Conditions
from tuneavideo.settings import Inflation

_IMAGE_CLASS = {
    VideoBlock: BasicTransformerBlock,
    SparseCausalAttention: Attention,
    TextAttention: Attention,
    ClipGroupNorm: nn.GroupNorm,
}
_ADDED = ("norm_temp", "attn_temp")
_LORA = "tuneavideo"  # name of the LoRA that is trained, for peft


@dataclass(frozen=True)
class VideoUNet:
    """An inflated UNet, called with clips; the only place where a clip becomes a batch of images."""

    unet: UNet2DConditionModel
    clip: ClipLayout
    control: Callable[..., dict[str, Any]] | None = None  # see `Control` in models/controlnet.py

    def __call__(self, x_BCTHW: Tensor, t: Tensor, text: Conditions | Tensor) -> Tensor:
        """Predict noise or velocity, `B C T H W`.

        Args:
            x_BCTHW: Noisy latents of B clips of T frames, in the scale that the base model takes.
            t: Timestep of all clips (a scalar) or of each (shape B).
            text: Conditions of each clip, shared by its frames; or their text embedding `B L D` alone.
        """
        self.clip.clips, frames = len(x_BCTHW), x_BCTHW.shape[2]
        self.clip.frames = frames
        dtype = get_parameter_dtype(self.unet)  # of the computation: weights may be kept in another
        x_NCHW = rearrange(x_BCTHW, "b c t h w -> (b t) c h w").to(dtype)
        t_N = t.repeat_interleave(frames) if t.ndim else t
        conditions = Conditions.of(text).to(dtype)
        of_frames = conditions.repeated(frames)
        added = of_frames.added(*x_NCHW.shape[-2:])
        more = self.control(x_NCHW, t_N, of_frames.text_BLD, added) if self.control else {}
        # one text per clip, not per frame: see TextAttention
        y_NCHW = self.unet(x_NCHW, t_N, conditions.text_BLD, added_cond_kwargs=added, return_dict=False, **more)[0]
        return rearrange(y_NCHW, "(b t) c h w -> b c t h w", t=frames)


def inflate(unet: UNet2DConditionModel, inflation: Inflation | None = None, *, seed: int = 0) -> VideoUNet:
    """Turn an image UNet into a video UNet, in place (Tune-A-Video, section 4.2).

    Every weight keeps its name and value. With `inflation.temporal_init` `"zero"` or `"copy"` (of the
    self-attention, but for the output) a still clip is denoised like the still image; `"official"` leaves the bias of
    the temporal output projection random, as the published code does.

    Args:
        unet: A diffusers UNet of `BasicTransformerBlock` (Stable Diffusion 1.x, 2.x, XL and derived models).
        inflation: Frames that attention refers to, span of the norms, and initial values of new layers.
        seed: Seed of the new layers' initial values.

    Returns:
        The function of latents `B C T H W`, timesteps (a scalar or `B`) and text embeddings `B L D` to predictions
        `B C T H W`.

    Raises:
        ModelError: The UNet has no transformer blocks, or is inflated already.
    """
    inflation = inflation or Inflation()
    blocks = [layer for layer in unet.modules() if isinstance(layer, BasicTransformerBlock)]
    if not blocks:
        raise ModelError(f"{type(unet).__name__} has no transformer blocks to inflate; give a Stable Diffusion UNet")
    if isinstance(blocks[0], VideoBlock):
        raise ModelError("this UNet is inflated already; deflate(unet) turns it back into an image UNet")
    clip = ClipLayout(references=inflation.references)
    generator = torch.Generator().manual_seed(seed)
    for block in blocks:
        _inflate_block(block, clip, inflation.temporal_init, generator, get_parameter_dtype(unet))
    for norm in _clip_norms(unet) if inflation.clip_norm else ():
        _become(norm, ClipGroupNorm, clip)
    _replace_class_name(unet, BasicTransformerBlock, VideoBlock)
    return VideoUNet(unet, clip)


def deflate(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Turn an inflated UNet into an image UNet again, in place.

    Args:
        unet: An inflated UNet; any other is unchanged.

    Returns:
        The same UNet, without temporal layers; tuned weights keep their values.
    """
    for layer in list(unet.modules()):
        if type(layer) is VideoBlock:
            for name in _ADDED:
                delattr(layer, name)
        if type(layer) in _IMAGE_CLASS:
            del layer.clip
            layer.__class__ = _IMAGE_CLASS[type(layer)]
    _replace_class_name(unet, VideoBlock, BasicTransformerBlock)
    return unet


def video_unet(unet: UNet2DConditionModel) -> VideoUNet:
    """Return the callable of a UNet that is inflated already.

    Raises:
        ModelError: The UNet is not inflated.
    """
    for layer in unet.modules():
        if isinstance(layer, VideoBlock):
            return VideoUNet(unet, layer.clip)
    raise ModelError("this UNet takes images only; inflate(unet) makes it take clips")


def added_parameters(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """Return the parameters that inflation added, by name."""
    return {name: p for name, p in unet.named_parameters() if any(f".{part}." in name for part in _ADDED)}


def trainable_parameters(
    unet: UNet2DConditionModel, trainable: Sequence[str], frozen: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Return parameters of layers whose name ends with one of `trainable` and begins with none of `frozen`, by name.

    Raises:
        SettingsError: A name matches no layer.
    """
    layers = [name for name, _ in unet.named_modules()]
    for end in trainable:
        if not any(name.endswith(end) for name in layers):
            raise SettingsError(
                f"trainable_modules: no layer's name ends with {end!r}; usual are attn1.to_q, attn_temp"
            )
    for begin in frozen:
        if not any(name.startswith(begin) for name in layers):
            raise SettingsError(f"frozen_modules: no layer's name begins with {begin!r}; usual is down_blocks")
    chosen = [name for name in layers if name.endswith(tuple(trainable)) and not name.startswith(tuple(frozen))]
    return {
        f"{layer}.{name}": parameter
        for layer in chosen
        for name, parameter in unet.get_submodule(layer).named_parameters()
    }


def low_rank_parameters(
    unet: UNet2DConditionModel, trainable: Sequence[str], frozen: Sequence[str], rank: int, seed: int = 0
) -> dict[str, nn.Parameter]:
    """Add a LoRA to every linear layer among the trainable ones; `unet.unload_lora()` removes them.

    The change of a weight is the product B A, which starts at zero. The entries of A have the variance 1 / rank, so
    that a step of Adam changes B A about as much as it would change a whole matrix, whatever the rank and width.

    Args:
        unet: An inflated UNet.
        trainable: Name suffixes of modules.
        frozen: Name prefixes of modules that are left out.
        rank: Rank of each product.
        seed: Of the random numbers of A.

    Returns:
        `LAYER.lora_A.weight` (rank x in) and `LAYER.lora_B.weight` (out x rank), and biases and norms as they are.

    Raises:
        SettingsError: A name matches no layer, or there is no linear layer.
    """
    chosen = trainable_parameters(unet, trainable, frozen)
    linear = [f"{name}.weight" for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)]
    matrices = {name for name in linear if name in chosen}
    if not matrices:
        raise SettingsError(f"lora_rank {rank}: no linear layer is among trainable_modules {', '.join(trainable)}")
    layers = sorted(name.removesuffix(".weight") for name in matrices)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), _LORA)
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, parameter in unet.named_parameters():
        name = name.replace(".base_layer.", ".").replace(f".{_LORA}.", ".")
        if name.endswith(".lora_A.weight"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / rank**0.5)
        if ".lora_" in name or name in chosen.keys() - matrices:
            found[name] = parameter
    return found


def _inflate_block(
    block: BasicTransformerBlock, clip: ClipLayout, init: str, generator: torch.Generator, dtype: torch.dtype
) -> None:
    like = block.attn1.to_q.weight
    width = like.shape[1]
    block.norm_temp = nn.LayerNorm(width)
    with torch.device("meta"):  # torch's own random numbers would be drawn for nothing
        attention = TemporalAttention(width, heads=block.attn1.heads, dim_head=like.shape[0] // block.attn1.heads)
    block.attn_temp = attention.to_empty(device="meta" if like.is_meta else "cpu")
    block.attn_temp.clip = clip
    _initialise(block.attn_temp, init, generator)
    if init == "copy":
        _copy_self_attention(block)
    for name in _ADDED:
        getattr(block, name).to(like.device, dtype).train(block.training)
    _become(block.attn1, SparseCausalAttention, clip)
    if type(block.attn2) is Attention:
        _become(block.attn2, TextAttention, clip)
    _become(block, VideoBlock, clip)


@torch.no_grad()
def _initialise(attention: Attention, init: str, generator: torch.Generator) -> None:
    bound = attention.to_q.weight.shape[1] ** -0.5  # torch's own default for a linear layer
    for name, parameter in attention.named_parameters():
        starts_at_zero = name == "to_out.0.weight" or (name == "to_out.0.bias" and init != "official")
        parameter.zero_() if starts_at_zero else parameter.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def _copy_self_attention(block: Any) -> None:
    """Start temporal attention with the norm and the projections of self-attention, but for the output."""
    for name in ("to_q", "to_k", "to_v"):
        getattr(block.attn_temp, name).weight.copy_(getattr(block.attn1, name).weight)
    if isinstance(block.norm1, nn.LayerNorm):
        block.norm_temp = copy.deepcopy(block.norm1)


def _clip_norms(unet: UNet2DConditionModel) -> Iterator[nn.GroupNorm]:
    for layer in unet.modules():
        if isinstance(layer, ResnetBlock2D):
            yield from (norm for norm in (layer.norm1, layer.norm2) if type(norm) is nn.GroupNorm)
    if unet.conv_norm_out is not None:
        yield unet.conv_norm_out


def _become(layer: nn.Module, kind: type[nn.Module], clip: ClipLayout) -> None:
    layer.__class__ = kind
    layer.clip = clip  # pyright: ignore[reportArgumentType]


def _replace_class_name(unet: UNet2DConditionModel, old: type, new: type) -> None:
    """Replace a class name in the lists by which diffusers finds blocks to compile and to keep on one device."""
    for attribute in ("_repeated_blocks", "_no_split_modules"):
        names = [new.__name__ if name == old.__name__ else name for name in getattr(unet, attribute)]
        setattr(unet, attribute, names)
