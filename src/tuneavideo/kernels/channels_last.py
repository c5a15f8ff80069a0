"""Layers of an image UNet and of a VAE for GPUs: channels last throughout, and small work joined into few kernels.

A map `N C H W` that lies channels last is the sequence `N S C` of a transformer: turning one into the other moves
nothing. Where a layer is not as published, or Triton is missing, the class that is replaced does the work.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from tuneavideo import kernels


def lay_out(network: nn.Module) -> None:
    """Have a network on a GPU compute as is fastest there, in place; no weight changes its name or value."""
    nn.Module.to(network, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    kinds: dict[type, Any] = {ResnetBlock2D: Residual, Transformer2DModel: Sites, GEGLU: Gate}
    for layer in network.modules():
        layer.__class__ = kinds.get(type(layer), type(layer))


def sites(x_NCHW: Tensor) -> Tensor:
    """`N C H W` as `N S C`: a view of what lies channels last."""
    return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2)


def maps(x_NSC: Tensor, like_NCHW: Tensor) -> Tensor:
    """`N S C` as `N C H W`, with the height and width of another map."""
    return x_NSC.unflatten(1, like_NCHW.shape[2:]).permute(0, 3, 1, 2)


def normalised(norm: nn.GroupNorm, x_NCHW: Tensor, *, silu: bool = False, shift_NC: Tensor | None = None) -> Tensor:
    """What a group norm, of images or of a clip, makes of `x + shift`, with SiLU if asked; `N S C`."""
    clip: Any = getattr(norm, "clip", None)
    return kernels.module("group_norm").group_norm(
        sites(x_NCHW), norm.num_groups, norm.weight, norm.bias, norm.eps,
        frames=clip.frames if clip else 1, silu=silu, shift_NC=shift_NC,
    )  # fmt: skip


class Residual(ResnetBlock2D):
    """Norms with their activation and what is added before; biases of convolutions added along with that."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """`N C H W` to `N O H W`."""
        if not self._as_published() or not kernels.suit(input_tensor, "residual"):
            return super().forward(input_tensor, temb, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        x: Any = input_tensor
        h = maps(normalised(self.norm1, x, silu=True), x)
        h = _convolved(self.conv1, h)
        shift = _bias(self.conv1)
        if self.time_emb_proj is not None and temb is not None:
            told = self.time_emb_proj(temb if self.skip_time_act else silu(temb)).float()
            shift = told if shift is None else told + shift.float()
        elif shift is not None:
            shift = shift.expand(len(h), -1)
        h = maps(normalised(self.norm2, h, silu=True, shift_NC=shift), h)
        h, bias = _convolved(self.conv2, h), _bias(self.conv2)
        if self.conv_shortcut is not None:
            more = _bias(self.conv_shortcut)
            x = _convolved(self.conv_shortcut, x)
            bias = bias + more if bias is not None and more is not None else more if bias is None else bias
        return maps(kernels.module("pointwise").added(sites(h), sites(x), bias), h)

    def _as_published(self) -> bool:
        convolutions = (self.conv1, self.conv2, self.conv_shortcut)
        return (
            self.upsample is None and self.downsample is None and self.output_scale_factor == 1
            and (self.time_embedding_norm == "default" or self.time_emb_proj is None)
            and isinstance(self.nonlinearity, nn.SiLU)
            and isinstance(self.norm1, nn.GroupNorm) and isinstance(self.norm2, nn.GroupNorm)
            and (not self.training or self.dropout.p == 0)
            and all(layer is None or type(layer) is nn.Conv2d for layer in convolutions)
        )  # fmt: skip


def _convolved(layer: Any, x_NCHW: Tensor) -> Tensor:
    """A convolution without its bias."""
    return layer._conv_forward(x_NCHW, layer.weight, None)


def _bias(layer: Any) -> Tensor | None:
    return layer.bias


class Sites(Transformer2DModel):
    """A transformer on the sites of a map, which stay where they are."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> Any:
        if not self._as_published() or not kernels.suit(hidden_states, "sites"):
            return super()._operate_on_continuous_inputs(hidden_states)
        x_NSC = _projected(self.proj_in, normalised(self.norm, hidden_states))
        return x_NSC, x_NSC.shape[2]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if not self._as_published() or not kernels.suit(hidden_states, "sites"):
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        y_NSC = _projected(self.proj_out, hidden_states)
        return maps(kernels.module("pointwise").added(y_NSC, sites(residual)), residual)

    def _as_published(self) -> bool:
        plain = all(type(layer) in (nn.Conv2d, nn.Linear) for layer in (self.proj_in, self.proj_out))
        return plain and isinstance(self.norm, nn.GroupNorm)


def _projected(layer: Any, x_NSC: Tensor) -> Tensor:
    """A linear layer, or a convolution of single sites, which is one."""
    return layer(x_NSC) if type(layer) is nn.Linear else linear(x_NSC, layer.weight.flatten(1), layer.bias)


class Gate(GEGLU):
    """Halves that are multiplied in one pass."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`N L C` to `N L D`."""
        if not kernels.suit(hidden_states, "gate"):
            return super().forward(hidden_states, *args, **kwargs)
        return kernels.module("pointwise").gated(self.proj(hidden_states))
