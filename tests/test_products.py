"""What is true of layers computed as products: they are the same layers, within the rounding of bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import Tensor, nn

from tests.conftest import image_unet
from tuneavideo.kernels import products
from tuneavideo.method.inflate import deflate, inflate


def learned(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer makes of `x`, and the gradient of `x`."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(torch.sin(torch.arange(y.numel(), dtype=torch.float32)).view(y.shape).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def close(found: Tensor, right: Tensor) -> bool:
    return float((found.double() - right.double()).norm() / right.double().norm()) < 0.005


@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (1, 0), ((3, 1), (1, 0)), ((2, 3), (0, 2))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("biased", [True, False])
def test_a_convolution_is_the_same_and_so_is_its_gradient(
    kernel: Any, padding: Any, layout: torch.memory_format, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SMALL", {True: 99, False: 99})
    torch.manual_seed(0)
    layer = nn.Conv2d(12, 20, kernel, padding=padding, bias=biased).bfloat16().requires_grad_(False)
    x = torch.randn(2, 12, 5, 6).bfloat16().to(memory_format=layout)
    right = learned(layer, x)
    nn.Module.to(layer, memory_format=layout)  # pyright: ignore[reportCallIssue]
    layer.__class__ = products.Convolution
    assert all(close(*each) for each in zip(learned(layer, x), right, strict=True))


def test_a_convolution_with_edges_of_another_kind_or_that_learns_is_torchs_own() -> None:
    x = torch.randn(1, 4, 3, 3).bfloat16()
    for change in ({"padding_mode": "circular"}, {"padding": "same"}, {}):
        layer = nn.Conv2d(4, 4, 3, **{"padding": 1, **change}).bfloat16().requires_grad_(not change)
        right = layer(x)
        layer.__class__ = products.Convolution
        assert torch.equal(layer(x), right)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_a_gate_is_the_same_and_so_is_its_gradient() -> None:
    torch.manual_seed(0)
    layer = GEGLU(12, 20).bfloat16()
    x = torch.randn(2, 7, 12).bfloat16()
    right = learned(layer, x)
    layer.__class__ = products.Gate
    assert all(close(*each) for each in zip(learned(layer, x), right, strict=True))


@torch.no_grad()
def test_a_unet_in_bf16_is_the_same_by_name_and_prediction_and_others_are_left_as_they_are() -> None:
    unet, x, text = image_unet(2), torch.randn(2, 4, 2, 8, 8), torch.randn(2, 5, 24)
    products.lay_out(unet)
    assert not any(isinstance(layer, products.Convolution) for layer in unet.modules())
    nn.Module.to(unet, torch.bfloat16)
    video = inflate(unet)
    names, right = list(unet.state_dict()), video(x, torch.tensor(300), text)
    products.lay_out(unet)
    assert list(unet.state_dict()) == names
    assert torch.allclose(video(x, torch.tensor(300), text), right, atol=0.02)
    nn.Module.to(deflate(unet), torch.float32)
    assert unet(x[:, :, 0], 300, text).sample.isfinite().all()
