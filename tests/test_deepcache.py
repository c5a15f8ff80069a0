"""Feature reuse (DeepCache), and edits in one batch."""

from __future__ import annotations

import torch

from tests.conftest import image_unet
from tests.shared.inflation import randomised
from tuneavideo.method.deepcache import inner_layers, reusing
from tuneavideo.method.inflate import VideoUNet, inflate


def tuned() -> VideoUNet:
    video = inflate(image_unet(layers_per_block=2))
    randomised(video.unet)
    return video


@torch.no_grad()
def test_features_computed_at_every_step_change_nothing() -> None:
    video = tuned()
    assert reusing(video, 1) is video
    x, t, text = torch.randn(1, 4, 3, 8, 8), torch.tensor(500), torch.randn(1, 5, 24)
    again = reusing(video, 2)
    assert torch.equal(again(x, t, text), video(x, t, text))


@torch.no_grad()
def test_features_of_the_same_input_are_the_same_when_used_again() -> None:
    video = tuned()
    x, t, text = torch.randn(1, 4, 3, 8, 8), torch.tensor(500), torch.randn(1, 5, 24)
    again = reusing(video, 3)
    first = again(x, t, text)
    asked = []
    handles = [layer.register_forward_pre_hook(lambda *_: asked.append(1)) for layer in video.unet.mid_block.resnets]
    assert torch.allclose(again(x, t, text), first, atol=1e-6)
    assert not asked
    for handle in handles:
        handle.remove()
    assert not torch.allclose(again(x + 0.1, t, text), video(x + 0.1, t, text))
    assert torch.equal(again(x + 0.1, t, text), video(x + 0.1, t, text))


@torch.no_grad()
def test_each_text_has_features_of_its_own() -> None:
    video = tuned()
    x, t = torch.randn(1, 4, 3, 8, 8), torch.tensor(500)
    again, texts = reusing(video, 2), torch.randn(2, 1, 5, 24)
    for _ in range(2):
        for text in texts:
            assert torch.allclose(again(x, t, text), video(x, t, text), atol=1e-6)


@torch.no_grad()
def test_the_unet_is_what_it_was_afterwards() -> None:
    video = tuned()
    x, t, text = torch.randn(1, 4, 3, 8, 8), torch.tensor(500), torch.randn(1, 5, 24)
    before = video(x, t, text)
    again = reusing(video, 2)
    again(x, t, text)
    again(x + 1, t, text)
    assert torch.equal(video(x, t, text), before)
    assert not any("forward" in vars(layer) for layer in inner_layers(video.unet))
