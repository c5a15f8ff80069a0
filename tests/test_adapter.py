"""Adapters: their contents, the UNets that they fit, and their removal without a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.conftest import image_unet
from tests.shared.adapter import LAYERS, learned
from tuneavideo.errors import AdapterError
from tuneavideo.method.inflate import added_parameters, trainable_parameters
from tuneavideo.models.adapter import Adapter
from tuneavideo.settings import Inflation


def seen(unet: UNet2DConditionModel) -> torch.Tensor:
    from tuneavideo.method.inflate import video_unet

    rng = torch.Generator().manual_seed(2)
    x, text = torch.randn(1, 4, 3, 8, 8, generator=rng), torch.randn(1, 5, 24, generator=rng)
    with torch.no_grad():
        return video_unet(unet)(x, torch.tensor(50), text)


@pytest.mark.parametrize("inflation", [Inflation(), Inflation(("first", "own"), False, "official")])
def test_a_saved_adapter_makes_the_same_video_unet_of_a_fresh_base(inflation: Inflation, tmp_path: Path) -> None:
    tuned = image_unet()
    adapter = learned(tuned, inflation)
    adapter.save(tmp_path / "adapter", dtype=None)
    fresh = image_unet()
    loaded = Adapter.load(tmp_path / "adapter")
    loaded.attach(fresh)
    assert loaded.inflation == inflation and loaded.about == {"prompt": "a square"} and loaded.base == "tiny"
    assert torch.equal(seen(fresh), seen(tuned))


def test_an_adapter_holds_every_added_and_every_tuned_tensor_and_nothing_else() -> None:
    unet = image_unet()
    names = set(learned(unet).tensors)
    assert names == set(added_parameters(unet)) | set(trainable_parameters(unet, LAYERS))
    assert any("norm_temp" in name for name in names)


def test_detaching_leaves_the_base_bit_identical() -> None:
    unet = image_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    attached = learned(image_unet()).attach(unet)
    assert any(not torch.equal(unet.state_dict()[name], value) for name, value in before.items())
    attached.detach()
    after = unet.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_copies_of_the_base_in_any_precision_are_the_same_base(dtype: torch.dtype) -> None:
    attached = learned(image_unet()).attach(image_unet().to(dtype))
    assert attached.video.unet.dtype == dtype


def test_another_base_of_the_same_shape_is_refused_and_left_as_it_was() -> None:
    other = image_unet(seed=9)
    with pytest.raises(AdapterError, match="another base than this one.*'tiny'"):
        learned(image_unet()).attach(other)
    assert not added_parameters(other)


def test_a_base_of_another_shape_is_refused_with_the_layer_that_differs() -> None:
    with pytest.raises(AdapterError, match=r"does not fit this UNet: .*attn.* expected"):
        learned(image_unet()).attach(image_unet(cross_attention_dim=32, block_out_channels=(24, 32)))


def test_the_saved_adapter_is_in_half_precision_and_without_the_base(tmp_path: Path) -> None:
    unet = image_unet()
    adapter = learned(unet)
    folder = adapter.save(tmp_path / "adapter")
    size = (folder / "adapter.safetensors").stat().st_size
    values = sum(tensor.numel() for tensor in adapter.tensors.values())
    assert 2 * values < size < 2 * values + 20_000
    assert {tensor.dtype for tensor in Adapter.load(folder).tensors.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "adapter.safetensors").unlink(), "adapter.safetensors is missing"),
        (lambda folder: (folder / "adapter.safetensors").write_bytes(b"x" * 90), "damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "damaged"),
        (lambda folder: (folder / "adapter_config.json").write_text(json.dumps({"format": 99})), "upgrade"),
    ],
)
def test_a_damaged_adapter_says_so(damage, told: str, tmp_path: Path) -> None:
    folder = learned(image_unet()).save(tmp_path / "adapter")
    damage(folder)
    with pytest.raises(AdapterError, match=told):
        Adapter.load(folder)
