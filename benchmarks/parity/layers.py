"""Comparison of single layers, with their weights and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from einops import rearrange
from torch import Tensor, nn

from benchmarks.parity.compare import LAYER, Difference, absolute, gradients_agree
from benchmarks.parity.golden import Golden, On, Place
from tuneavideo.method.attention import ClipLayout
from tuneavideo.method.inflate import inflate


class Parts(nn.Module):
    """A minimal UNet for `inflate`: a transformer block and another layer."""

    conv_norm_out, _repeated_blocks, _no_split_modules = None, (), ()

    def __init__(self, block: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.block, self.layer = block, layer


def attention_block(w: dict[str, Tensor], about: dict[str, Any]) -> BasicTransformerBlock:
    """Make a block with the attention layers of `w`, or whose self- or cross-attention `w` is."""
    query = w.get("attn1.to_q.weight", w.get("to_q.weight", torch.empty(8, 8)))
    key = w.get("attn2.to_k.weight", w.get("to_k.weight", query))
    heads = about.get("heads", 1)
    return BasicTransformerBlock(query.shape[1], heads, query.shape[0] // heads, cross_attention_dim=key.shape[1])


def feed_forward(w: dict[str, Tensor], _: dict[str, Any]) -> FeedForward:
    width, inner = w["net.2.weight"].shape
    return FeedForward(width, inner_dim=inner, activation_fn="geglu")


def transformer(w: dict[str, Tensor], about: dict[str, Any]) -> Transformer2DModel:
    count = len({name.split(".")[1] for name in w if name.startswith("transformer_blocks.")})
    text = w["transformer_blocks.0.attn2.to_k.weight"].shape[1]
    sizes = {"num_layers": count, "norm_num_groups": about["norm_num_groups"], "cross_attention_dim": text}
    width, is_linear = w["norm.weight"].shape[0], w["proj_in.weight"].ndim == 2
    return Transformer2DModel(about["heads"], about["dim_head"], width, use_linear_projection=is_linear, **sizes)


def resnet(w: dict[str, Tensor], about: dict[str, Any]) -> ResnetBlock2D:
    width_out, width_in = w["conv1.weight"].shape[:2]
    embedding = w["time_emb_proj.weight"].shape[1] if "time_emb_proj.weight" in w else None
    sizes = {"in_channels": width_in, "out_channels": width_out, "temb_channels": embedding}
    return ResnetBlock2D(**sizes, groups=about["groups"], eps=about["eps"])


def resampling(kind: type[nn.Module], w: dict[str, Tensor], **rest: Any) -> nn.Module:
    width_out, width_in = w["conv.weight"].shape[:2]
    return kind(width_in, use_conv=True, out_channels=width_out, **rest)


LAYERS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], nn.Module], str]] = {
    # beginning of the file's name: (image layer to make and to inflate, which of its parts is meant)
    "sparse_causal_attn": (attention_block, "attn1"),
    "cross_attn": (attention_block, "attn2"),
    "feed_forward": (feed_forward, ""),
    "basic_transformer_block": (attention_block, ""),
    "transformer3d": (transformer, ""),
    "resnet3d": (resnet, ""),
    "upsample3d": (lambda w, _: resampling(Upsample2D, w), ""),
    "downsample3d": (lambda w, _: resampling(Downsample2D, w, name="op"), ""),
}


def called(layer: nn.Module, inputs: dict[str, Tensor], clip: ClipLayout, about: dict[str, Any]) -> Tensor:
    """Call an image layer for clips `B C T H W` or tokens of images `N L C`; the output has the input's layout."""
    others = dict(inputs)
    x = others.pop("x" if "x" in inputs else "hidden_states")
    if "output_size" in about:
        others["output_size"] = tuple(about["output_size"][1:])
    if x.ndim == 5:
        clip.frames = x.shape[2]
        each = {n: v.repeat_interleave(clip.frames, dim=0) if isinstance(v, Tensor) else v for n, v in others.items()}
        y = layer(rearrange(x, "b c t h w -> (b t) c h w"), **each)
        return rearrange(y if isinstance(y, Tensor) else y[0], "(b t) c h w -> b c t h w", t=clip.frames)
    clip.frames = about.get("video_length", 1)
    return layer(x, **others)


def layer(place: Place, golden: Golden) -> Iterator[Difference]:
    """Compare one inflated layer, and the gradients of sum(out * grad_out)."""
    kind = next((kind for kind in LAYERS if place.path.name.startswith(kind)), None)
    if kind is None:
        raise ValueError(f"no such layer is known; known are {', '.join(LAYERS)}")
    make, part = LAYERS[kind]
    weights, inputs = golden.under("w."), golden.under("in.")
    whole = make(weights, golden.about).to(On.device)
    clip = inflate(Parts(BasicTransformerBlock(8, 1, 8), whole)).clip
    module = whole.get_submodule(part)
    module.load_state_dict(weights)
    wanted = {f"in.{name}": value.requires_grad_() for name, value in inputs.items()}
    wanted |= {f"w.{name}": value for name, value in module.named_parameters()}
    output = called(module, inputs, clip, golden.about)
    yield absolute("out_f32", output, golden["out_f32"], LAYER)
    found = torch.autograd.grad(output, list(wanted.values()), golden["grad_out"])
    recorded = {f"{kind}.{name}": g for kind in ("in", "w") for name, g in golden.under(f"grad_{kind}.").items()}
    yield from gradients_agree(dict(zip(wanted, found, strict=True)), recorded)
