"""Layers of image UNets and VAEs for GPUs: channels-last format throughout and fused small operations.

A feature map `N C H W` in channels-last format is the sequence `N S C` of a transformer (S = H*W): either is a view of
the other. Where a layer differs from the published one, or Triton is missing, the replaced class computes it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from tuneavideo.kernels import supports
from tuneavideo.kernels.normalisation import add, normalise_groups, to_map, to_tokens


def optimise(network: nn.Module) -> None:
    """Change memory format and layers of a network in place, if it is on a GPU; weights keep names and values."""
    if next(network.parameters()).device.type == "cuda":
        replace_layers(network)


def replace_layers(network: nn.Module) -> None:
    """Change memory format and layers of a network in place, on any device."""
    nn.Module.to(network, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    classes: dict[type, Any] = {ResnetBlock2D: Residual, Transformer2DModel: Transformer, GEGLU: Gate}
    for layer in network.modules():
        layer.__class__ = classes.get(type(layer), type(layer))


class Residual(ResnetBlock2D):
    """A residual block: each norm, its activation and the addition before it are one kernel, biases added in it."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """`N C H W` to `N O H W`."""
        if not self._as_published() or not supports(input_tensor):
            return super().forward(input_tensor, temb, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        x: Any = input_tensor
        h = to_map(normalise_groups(self.norm1, x, silu=True), x)
        h = _without_bias(self.conv1, h)
        shift = _bias(self.conv1)
        if self.time_emb_proj is not None and temb is not None:
            embedding = self.time_emb_proj(temb if self.skip_time_act else silu(temb))
            shift = embedding if shift is None else embedding + shift
        elif shift is not None:
            shift = shift.expand(len(h), -1)
        h = to_map(normalise_groups(self.norm2, h, silu=True, shift_NC=shift), h)
        h, bias = _without_bias(self.conv2, h), _bias(self.conv2)
        if self.conv_shortcut is not None:
            more = _bias(self.conv_shortcut)
            x = _without_bias(self.conv_shortcut, x)
            bias = bias + more if bias is not None and more is not None else more if bias is None else bias
        return to_map(add(to_tokens(h), to_tokens(x), bias), h)

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


def _without_bias(layer: Any, x_NCHW: Tensor) -> Tensor:
    return layer._conv_forward(x_NCHW, layer.weight, None)


def _bias(layer: Any) -> Tensor | None:
    return layer.bias


class Transformer(Transformer2DModel):
    """A transformer on a feature map, whose tokens are a view of the map."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> Any:
        if not self._as_published() or not supports(hidden_states):
            return super()._operate_on_continuous_inputs(hidden_states)
        x_NSC = _project(self.proj_in, normalise_groups(self.norm, hidden_states))
        return x_NSC, x_NSC.shape[2]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if not self._as_published() or not supports(hidden_states):
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        return to_map(add(_project(self.proj_out, hidden_states), to_tokens(residual)), residual)

    def _as_published(self) -> bool:
        plain = all(type(layer) in (nn.Conv2d, nn.Linear) for layer in (self.proj_in, self.proj_out))
        return plain and isinstance(self.norm, nn.GroupNorm)


def _project(layer: Any, x_NSC: Tensor) -> Tensor:
    """Apply a linear layer, or a 1 x 1 convolution as one."""
    return layer(x_NSC) if type(layer) is nn.Linear else linear(x_NSC, layer.weight.flatten(1), layer.bias)


class Gate(GEGLU):
    """GEGLU whose gate is one kernel."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`N L C` to `N L D`."""
        if not supports(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        from tuneavideo.kernels import pointwise

        return pointwise.gate(self.proj(hidden_states))
