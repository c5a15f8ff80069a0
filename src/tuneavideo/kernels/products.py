"""Layers of an image UNet as matrix products, which CPUs compute faster in bf16.

torch's convolutions bring their weights into another order at every call and use few of the tile instructions for small
maps: there a product with the columns of the map (im2col) takes two thirds to a sixth of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad

from tuneavideo.kernels import tiles

# A map is small if it has no more sites than this times the channels of the layer: with tile instructions, and without.
SMALL = {True: 0.8, False: 0.1}


def lay_out(unet: UNet2DConditionModel) -> None:
    """Have a UNet compute as is fastest on its device in its precision: in bf16 on a CPU otherwise than elsewhere.

    Weights of convolutions are kept channels last (which is slower in full precision); no weight changes its name.
    """
    if unet.device.type != "cpu" or unet.dtype != torch.bfloat16:
        return
    nn.Module.to(unet, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    for layer in unet.modules():
        if type(layer) is nn.Conv2d and layer.stride == layer.dilation == (1, 1) and layer.groups == 1:
            layer.__class__ = Convolution
        elif type(layer) is GEGLU:
            layer.__class__ = Gate


class Convolution(nn.Conv2d):
    """One of stride 1, whose small maps are columns."""

    def forward(self, input: Tensor) -> Tensor:
        """`N C H W` to `N O H W`."""
        sites, weight = input[:, 0].numel(), self.weight
        plain = self.padding_mode == "zeros" and isinstance(self.padding, tuple)
        if input.dtype != torch.bfloat16 or input.device.type != "cpu" or weight.requires_grad or not plain:
            return super().forward(input)
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            x_NHWC = input.movedim(1, -1)
            y_XO = linear(x_NHWC.flatten(0, 2), weight.flatten(1), self.bias)
            return y_XO.unflatten(0, x_NHWC.shape[:3]).movedim(-1, 1)
        if sites > SMALL[tiles.has_tiles()] * self.in_channels:
            return super().forward(input)
        return _Columns.apply(input, weight, self.bias, self.padding)  # pyright: ignore[reportReturnType]


class Gate(GEGLU):
    """Both halves projected apart: what lies in strides is gated several times slower."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`N L C` to `N L D`."""
        if type(self.proj) is not nn.Linear or hidden_states.device.type != "cpu":
            return super().forward(hidden_states, *args, **kwargs)
        biases = (None, None) if self.proj.bias is None else self.proj.bias.chunk(2)
        told, gate = (linear(hidden_states, *half) for half in zip(self.proj.weight.chunk(2), biases, strict=True))
        return told * gelu(gate)


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, w_OCKK: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        (down, right), (high, wide) = padding, w_OCKK.shape[2:]
        x_NHWC = pad(x_NCHW.movedim(1, -1), (0, 0, right, right, down, down))
        sites_NHWKKC = x_NHWC.unfold(1, high, 1).unfold(2, wide, 1).movedim(3, -1)
        ctx.save_for_backward(w_OCKK)
        ctx.padding = padding
        y_XO = linear(sites_NHWKKC.flatten(3).flatten(0, 2), _flat(w_OCKK), bias)
        return y_XO.unflatten(0, sites_NHWKKC.shape[:3]).movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (w_OCKK,), dy_NHWO, (down, right) = ctx.saved_tensors, gradients[0].movedim(1, -1), ctx.padding
        (images, rows, sites, _), (_, channels, high, wide) = dy_NHWO.shape, w_OCKK.shape
        d_NHWKKC = (dy_NHWO.flatten(0, 2) @ _flat(w_OCKK)).view(*dy_NHWO.shape[:3], high, wide, channels)
        dx_NHWC = dy_NHWO.new_zeros(images, rows + high - 1, sites + wide - 1, channels, dtype=torch.float32)
        for i in range(high):
            for j in range(wide):
                dx_NHWC[:, i : i + rows, j : j + sites] += d_NHWKKC[:, :, :, i, j]
        inner = dx_NHWC[:, down : dx_NHWC.shape[1] - down, right : dx_NHWC.shape[2] - right]
        return inner.movedim(-1, 1).to(dy_NHWO.dtype), None, None, None


def _flat(w_OCKK: Tensor) -> Tensor:
    """The weights of a row of columns; no copy where they are kept channels last."""
    return w_OCKK.movedim(1, -1).flatten(1)
