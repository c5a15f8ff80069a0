"""What is true of attention made a tile at a time: it is attention, within rounding; so are gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tests.conftest import image_unet
from tuneavideo.kernels import tiles
from tuneavideo.method.inflate import inflate


def error(found: Tensor, true: Tensor) -> float:
    return float((found.detach().double() - true.detach()).norm() / true.detach().norm())


@pytest.mark.parametrize("tile", [2**21, 64, 7])
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
@pytest.mark.parametrize(("rows", "looked", "width"), [(24, 40, 8), (3, 1, 8), (5, 9, 20)])
def test_it_is_attention_and_so_are_its_gradients(
    tile: int, sharpness: float, rows: int, looked: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    torch.manual_seed(0)
    shapes = ((2, 3, rows, 8), (2, 3, looked, 8), (2, 3, looked, width))
    ours = [(torch.randn(shape) * sharpness).bfloat16().requires_grad_() for shape in shapes]
    true = [x.detach().double().requires_grad_() for x in ours]
    asked = torch.randn(2, 3, rows, width).bfloat16()
    made, wanted = tiles.attend(*ours, 0.3), scaled_dot_product_attention(*true, scale=0.3)
    made.backward(asked)
    wanted.backward(asked.double())
    assert error(made, wanted) < 0.02
    for found, right in zip(ours, true, strict=True):
        assert error(found.grad, right.grad) < 0.02 or right.grad.norm() < 1e-9  # pyright: ignore


def test_scores_far_from_zero_keep_their_differences() -> None:
    q, k = torch.full((1, 1, 1, 2), 16.0).bfloat16(), torch.tensor([[[[100.0, 0.0], [100.0, 0.25]]]]).bfloat16()
    v = torch.eye(2)[None, None].bfloat16()
    wanted = scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=0.1)
    assert torch.allclose(tiles.attend(q, k, v, 0.1).float(), wanted, atol=0.005)


@torch.no_grad()
@pytest.mark.parametrize("led", [False, True])
def test_a_unet_in_bf16_predicts_what_it_does_in_full_precision(led: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "has_tiles", lambda: False)
    video = inflate(image_unet(2))
    x, text = torch.randn(3, 4, 4, 8, 8), torch.randn(3, 5, 24)
    video.clip.inject = led
    full = video(x, torch.tensor(300), text)
    torch.nn.Module.to(video.unet, torch.bfloat16)
    assert error(video(x, torch.tensor(300), text), full.double()) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("tile", [2**21, 64])
def test_in_full_precision_maps_that_clips_share_are_those_they_would_have_each(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "TILE", tile)
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 24, 8), torch.randn(2, 3, 150, 8), torch.randn(2, 3, 150, 24)
    wanted = [scaled_dot_product_attention(q, k, own, scale=0.3) for own in v.split(8, dim=-1)]
    assert torch.allclose(tiles.attend(q, k, v, 0.3), torch.cat(wanted, dim=-1), atol=2e-6)


def test_only_on_a_cpu_and_where_it_is_faster_is_it_made_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 what learns, small and shared maps, and without tile instructions all; in full precision shared ones."""
    few, many = torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 512, 4)
    for has in (False, True):
        monkeypatch.setattr(tiles, "has_tiles", lambda has=has: has)
        for x, clips in ((few, 1), (many, 9)):
            assert tiles.suit(x.bfloat16(), x, clips)
        assert tiles.suit(many.bfloat16(), many, 1) is not has
        assert tiles.suit(many.bfloat16().requires_grad_(), many, 1)
        assert not tiles.suit(few.clone().requires_grad_(), few, 9)
        assert tiles.suit(few, few, 3) and not tiles.suit(few, few, 2)
        assert not tiles.suit(few.half(), few, 1)


@pytest.mark.parametrize("needed", [(True, False, False), (True, False, True), (True, True, False)])
def test_gradients_that_nobody_needs_are_not_made_and_the_others_are_the_same(needed: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    all_of_them, some = ([torch.randn(1, 2, 70, 8).bfloat16() for _ in range(3)] for _ in range(2))
    for x, y, need in zip(all_of_them, some, needed, strict=True):
        x.requires_grad_()
        y.copy_(x.detach()).requires_grad_(need)
    for xs in (all_of_them, some):
        tiles.attend(*xs, 0.3).float().square().sum().backward()
    for x, y, need in zip(all_of_them, some, needed, strict=True):
        assert torch.equal(y.grad, x.grad) if need else y.grad is None  # pyright: ignore
