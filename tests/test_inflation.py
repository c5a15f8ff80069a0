"""An inflated UNet: sparse-causal and temporal attention, norms over a clip, names kept."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch.nn.functional import group_norm

from tests.conftest import image_unet
from tests.shared.inflation import SHAPES, randomised
from tuneavideo.errors import ModelError
from tuneavideo.method.attention import (
    REFERENCES,
    ClipGroupNorm,
    ClipLayout,
    SparseCausalAttention,
    only_first,
    referred,
)
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import added_parameters, deflate, inflate, trainable_parameters, video_unet
from tuneavideo.setting_types import choices
from tuneavideo.settings import Inflation, TuneSettings


def conditions(unet: UNet2DConditionModel, clips: int) -> Conditions:
    pooled = None if unet.config.addition_embed_type is None else torch.randn(clips, 24)
    return Conditions(torch.randn(clips, 5, 24), pooled)


def test_every_frame_refers_to_the_first_frame_and_the_one_before() -> None:
    frame_BTLC = torch.arange(5.0).reshape(1, 5, 1, 1).expand(2, 5, 3, 4)
    assert only_first(5, ("first", "previous")) == 2
    seen = referred(frame_BTLC, 2, 5, ("first", "previous"))
    assert seen.shape == (2, 3, 6, 4)
    assert seen[1, :, 0, 0].tolist() == [0] * 3
    assert seen[1, :, 3, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 8, 8), (2, 8, 8), (5, 6, 10), (3, 7, 9)])
@torch.no_grad()
def test_a_still_clip_is_denoised_like_the_still_image(shape: str, frames: int, height: int, width: int) -> None:
    unet = image_unet(**SHAPES[shape])
    images, told, t = torch.randn(2, 4, height, width), conditions(unet, 2), torch.tensor([3, 700])
    still = unet(images, t, told.text_BLD, added_cond_kwargs=told.added(height, width)).sample
    clip = inflate(unet)(images[:, :, None].expand(-1, -1, frames, -1, -1), t, told)
    for frame in clip.unbind(2):
        assert (frame - still).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_every_image_weight_keeps_its_name_and_value(shape: str) -> None:
    unet = image_unet(**SHAPES[shape])
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    inflate(unet)
    after = unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = set(after) - set(before)
    blocks = sum(isinstance(layer, BasicTransformerBlock) for layer in unet.modules())
    assert len(new) == 7 * blocks and all(".attn_temp." in name or ".norm_temp." in name for name in new)


def layers_and_strides(unet: UNet2DConditionModel) -> tuple[list[type], list[tuple[int, ...]]]:
    return [type(layer) for layer in unet.modules()], [x.stride() for x in unet.state_dict().values()]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_deflating_gives_back_the_image_unet(shape: str) -> None:
    unet = image_unet(**SHAPES[shape])
    x, t, told = torch.randn(1, 4, 8, 8), torch.tensor(9), conditions(unet, 1)
    text, added = told.text_BLD, told.added(8, 8)
    before, names = unet(x, t, text, added_cond_kwargs=added).sample, list(unet.state_dict())
    repeated = list(unet._repeated_blocks)
    classes, strides = layers_and_strides(unet)
    inflate(unet)
    assert unet._repeated_blocks == ["VideoBlock"]
    deflate(unet)
    assert list(unet.state_dict()) == names and unet._repeated_blocks == repeated
    assert layers_and_strides(unet) == (classes, strides)
    assert not any(hasattr(layer, "clip") for layer in unet.modules())
    assert torch.equal(unet(x, t, text, added_cond_kwargs=added).sample, before)


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other() -> None:
    video = inflate(image_unet())
    randomised(video.unet)
    x, t, text = torch.randn(2, 4, 3, 8, 8), torch.tensor([4, 900]), torch.randn(2, 5, 24)
    together = video(x, t, text)
    for b in range(2):
        alone = video(x[b : b + 1], t[b : b + 1], text[b : b + 1])
        assert torch.allclose(together[b], alone[0], atol=1e-5)


@torch.no_grad()
def test_group_norms_span_the_clip_where_asked() -> None:
    x = torch.randn(6, 16, 4, 4)
    norm = torch.nn.GroupNorm(8, 16)
    per_frame = norm(x)
    norm.__class__, norm.clip = ClipGroupNorm, ClipLayout(frames=3)
    spanning = group_norm(x.unflatten(0, (2, 3)).transpose(1, 2), 8).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(norm(x), spanning, atol=1e-6)
    assert not torch.allclose(per_frame, spanning, atol=1e-2)
    plain = inflate(image_unet(), Inflation(clip_norm=False)).unet
    assert not any(isinstance(layer, ClipGroupNorm) for layer in plain.modules())
    pooled = inflate(image_unet()).unet
    spanning_names = {name for name, layer in pooled.named_modules() if isinstance(layer, ClipGroupNorm)}
    assert "conv_norm_out" in spanning_names and all("attentions" not in name for name in spanning_names)


def test_official_inflation_starts_from_a_random_bias_of_the_temporal_output() -> None:
    for init in ("zero", "official"):
        unet = inflate(image_unet(), Inflation(temporal_init=init)).unet
        biases = [p for name, p in added_parameters(unet).items() if name.endswith("attn_temp.to_out.0.bias")]
        assert biases and all(bool(bias.all()) == (init == "official") for bias in biases)
        assert all(bool(bias.any()) == (init == "official") for bias in biases)


def test_stable_diffusion_gains_and_tunes_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        inflate(unet)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 909_120_004
    assert len(added_parameters(unet)) == 112
    tuned = trainable_parameters(unet, TuneSettings.model_fields["trainable_modules"].default)
    assert len(tuned) == 112 and sum(parameter.numel() for parameter in tuned.values()) == 74_354_880
    kept = added_parameters(unet) | tuned
    assert 2 * sum(parameter.numel() for parameter in kept.values()) < 150e6


@torch.no_grad()
def test_slicing_and_fusing_of_attention_leave_sparse_causal_attention_in_place() -> None:
    video = inflate(image_unet())
    randomised(video.unet)
    x, t, text = torch.randn(1, 4, 3, 8, 8), torch.tensor(4), torch.randn(1, 5, 24)
    before = video(x, t, text)
    video.unet.set_attention_slice("max")
    assert torch.allclose(video(x, t, text), before, atol=1e-5)
    video.unet.set_default_attn_processor()
    video.unet.fuse_qkv_projections()
    assert torch.allclose(video(x, t, text), before, atol=1e-5)


@torch.no_grad()
def test_temporal_attention_in_parts_is_temporal_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    video = inflate(image_unet())
    randomised(video.unet)
    x, t, text = torch.randn(1, 4, 3, 8, 8), torch.tensor(4), torch.randn(1, 5, 24)
    whole = video(x, t, text)
    monkeypatch.setattr("tuneavideo.kernels.attention.MAX_BATCH", 7)
    assert torch.allclose(video(x, t, text), whole, atol=1e-6)


@torch.no_grad()
def test_a_copy_of_an_inflated_unet_is_independent() -> None:
    video = inflate(image_unet())
    other = video_unet(copy.deepcopy(video.unet))
    assert other.clip is not video.clip
    x, t, text = torch.randn(1, 4, 3, 8, 8), torch.tensor(4), torch.randn(1, 5, 24)
    assert torch.equal(other(x, t, text), video(x, t, text))


def test_what_cannot_be_inflated_is_refused() -> None:
    with pytest.raises(ModelError, match="inflated already"):
        inflate(inflate(image_unet()).unet)
    with pytest.raises(ModelError, match="no transformer blocks"):
        inflate(UNet2DModel(block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
                            up_block_types=("UpBlock2D",)))  # fmt: skip
    with pytest.raises(ModelError, match="images only"):
        video_unet(image_unet())


@torch.no_grad()
def test_the_text_of_a_clip_is_the_text_of_each_of_its_frames() -> None:
    video = inflate(image_unet())
    randomised(video.unet)
    x, t, text = torch.randn(2, 4, 3, 8, 8), torch.tensor(4), torch.randn(2, 5, 24)
    once = video(x, t, text)
    each = video.unet(x.transpose(1, 2).flatten(0, 1), t, text.repeat_interleave(3, dim=0)).sample
    assert torch.allclose(once, each.unflatten(0, (2, 3)).transpose(1, 2), atol=1e-5)


NUMBERS = {
    "first": lambda t, frames: 0,
    "previous": lambda t, frames: max(t - 1, 0),
    "own": lambda t, frames: t,
    "next": lambda t, frames: min(t + 1, frames - 1),  # a new entry of the table
}


@pytest.mark.parametrize(
    "references",
    [
        ("first", "previous"), ("previous",), ("first",), ("own", "first"), ("own",),
        ("next",), ("first", "next"), ("previous", "next"), ("previous", "own", "next"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("frames", [1, 2, 5])
@torch.no_grad()
def test_each_frame_attends_to_the_tokens_it_refers_to(references, frames, monkeypatch) -> None:
    monkeypatch.setitem(REFERENCES, "next", NUMBERS["next"])
    layer = Attention(16, heads=2, dim_head=8)
    x_TLC = torch.randn(frames, 6, 16)
    expected = []
    for t in range(frames):
        seen = torch.cat([x_TLC[NUMBERS[name](t, frames)] for name in references])
        expected.append(layer(x_TLC[t : t + 1], seen[None]))
    layer.__class__, layer.clip = SparseCausalAttention, ClipLayout(frames, references)
    assert torch.allclose(layer(x_TLC), torch.cat(expected), atol=1e-6)


def test_every_reference_is_a_choice_of_the_setting() -> None:
    assert choices(TuneSettings.model_fields["references"].annotation) == tuple(REFERENCES)
