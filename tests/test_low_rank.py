"""Adapters of LoRAs (`lora_rank`): small files that do everything that adapters of whole matrices do."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from tests.conftest import image_unet, moving_square
from tests.shared import style
from tests.shared.inflation import SHAPES
from tests.shared.job import BRIEF, same
from tests.shared.tuning import tuning
from tuneavideo import TuneAVideoPipeline, api
from tuneavideo.errors import AdapterError, RunError, SettingsError
from tuneavideo.interop.reading import read_checkpoint
from tuneavideo.method.inflate import inflate, low_rank_parameters, video_unet
from tuneavideo.models.adapter import Adapter, merged
from tuneavideo.settings import Inflation, TuneSettings
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.training import memory
from tuneavideo.video import read

LOW = {**BRIEF, "lora_rank": 2, "mixed_precision": "no", "formats": ("frames",)}
LAYERS = TuneSettings.model_fields["trainable_modules"].default


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with previews, averaged weights and one edit."""
    folder = tmp_path_factory.mktemp("runs")
    clip = moving_square(folder / "square.mp4")
    return api.tune(
        clip, "a red square moves", edit="a circle", base=str(base), out=folder / "run", use_ema=True, ema_decay=0.5,
        validation_steps=2, checkpointing_steps=1, **LOW,
    )  # fmt: skip


def predicted(unet: UNet2DConditionModel) -> torch.Tensor:
    rng = torch.Generator().manual_seed(2)
    x, text = torch.randn(1, 4, 3, 8, 8, generator=rng), torch.randn(1, 5, 24, generator=rng)
    with torch.no_grad():
        return video_unet(unet)(x, torch.tensor(50), text)


# Method


@pytest.mark.parametrize("shape", SHAPES)
def test_temporal_attention_starts_from_self_attention_and_adds_nothing(shape: str) -> None:
    unet, other = image_unet(**SHAPES[shape]), image_unet(**SHAPES[shape])
    inflate(unet, Inflation(temporal_init="copy"))
    inflate(other)
    for block in (layer for layer in unet.modules() if hasattr(layer, "attn_temp")):
        assert torch.equal(block.attn_temp.to_k.weight, block.attn1.to_k.weight)
        assert torch.equal(block.norm_temp.weight, block.norm1.weight)
        assert not any(parameter.any() for parameter in block.attn_temp.to_out[0].parameters())
    if not SHAPES[shape].get("addition_embed_type"):
        before = predicted(unet)
        assert torch.equal(before, predicted(other))
        low_rank_parameters(unet, LAYERS, (), rank=2)
        assert torch.equal(before, predicted(unet))


def test_tuning_lowers_the_loss_and_changes_loras_and_biases_only() -> None:
    work = tuning(max_train_steps=40, train_batch_size=2, learning_rate=2e-2, lora_rank=4)
    before = {name: value.clone() for name, value in work.video.unet.state_dict().items()}
    losses = [step.loss for step in work]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    moved = [n for n, value in work.video.unet.state_dict().items() if not torch.equal(value, before[n])]
    assert moved and all("lora_" in name or name.endswith("attn_temp.to_out.0.base_layer.bias") for name in moved)
    assert len(moved) == len(work.parameters)


def test_checkpointing_gives_every_factor_the_gradient_it_has_without() -> None:
    gradients = {}
    for checkpointing in (False, True):
        work = tuning(gradient_checkpointing=checkpointing, max_grad_norm=1e9, lora_rank=2)
        list(itertools.islice(work, 2))
        work.loss(*work.draw(0)).backward()
        gradients[checkpointing] = {name: parameter.grad for name, parameter in work.parameters.items()}
    for name, gradient in gradients[False].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[True][name]), name


def test_other_modules_are_trained_whole_and_some_linear_layer_is_needed() -> None:
    names = set(tuning(lora_rank=2, trainable_modules=("attn2.to_q", "norm_temp")).parameters)
    assert {name.split(".attn2.")[-1] for name in names if ".attn2." in name} == {
        "to_q.lora_A.weight", "to_q.lora_B.weight",
    }  # fmt: skip
    assert all(".attn2." in name or ".norm_temp." in name for name in names)
    with pytest.raises(SettingsError, match="no linear layer"):
        tuning(lora_rank=2, trainable_modules=("norm_temp",))


@pytest.mark.parametrize("rank", [4, 16])
def test_the_adapter_of_stable_diffusion_has_a_few_megabytes(rank: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    inflate(unet, Inflation(temporal_init="copy"))
    tuned = low_rank_parameters(unet, LAYERS, (), rank)
    numbers = sum(parameter.numel() for parameter in tuned.values())
    assert len(tuned) == 16 * (6 * 2 + 1) and numbers == 149_760 * rank + 12_480
    assert 2 * numbers < (5e6 if rank == 16 else 1.3e6)


def test_the_published_arithmetic_has_no_loras() -> None:
    with pytest.raises(ValueError, match="lora_rank 4 .* temporal_init official"):
        TuneSettings(video="-", prompt="-", lora_rank=4, temporal_init="official")


# A run


def test_a_run_keeps_loras_only(run: Path) -> None:
    tensors = load_file(run / "adapter/adapter.safetensors")
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight", "attn_temp.to_out.0.bias")) for name in tensors)
    assert {len(tensor) for name, tensor in tensors.items() if ".lora_A." in name} == {2}
    assert len(RunFolder.open(run).samples()) == 3 and api.report(run).is_file()


def test_an_edit_made_later_is_the_edit_made_at_once(run: Path) -> None:
    (later,) = api.edit(run, "a circle")
    assert (read(later / "frames").frames_THWC == read(run / "edits/000-a-circle/frames").frames_THWC).all()


@pytest.mark.parametrize("settings", [{}, {"window": 2, "strength": 0.7}])
def test_the_pipeline_makes_the_frames_that_the_command_makes(settings: dict, run: Path) -> None:
    (folder,) = api.edit(run, "a circle", **settings)
    pipe = TuneAVideoPipeline.from_pretrained(RunFolder(run).read_settings().base, adapter=run)
    inverted = pipe.invert(**{name: value for name, value in settings.items() if name == "window"})
    made = pipe("a circle", latents=inverted, generator=torch.Generator(), output_type="video", **settings).frames[0]
    assert (made.frames_THWC == read(folder / "frames").frames_THWC).all()


def test_a_pipeline_is_saved_with_its_loras_and_gives_the_base_back(run: Path, base: Path, tmp_path: Path) -> None:
    pipe = TuneAVideoPipeline.from_pretrained(base, adapter=run)
    pipe.save_pretrained(tmp_path / "saved")
    again = TuneAVideoPipeline.from_pretrained(tmp_path / "saved")
    assert torch.equal(predicted(again.unet), predicted(pipe.unet))
    kept, before = (Adapter.load(folder / "adapter").tensors for folder in (tmp_path / "saved", run))
    assert kept.keys() == before.keys()
    tuned = read_checkpoint(tmp_path / "saved").tensors
    assert all(torch.equal(tuned[f"unet.{name}"].read(), value) for name, value in pipe.unet.state_dict().items())
    again.unload_video_adapter()
    base_weights = image_unet().state_dict()
    assert all(torch.equal(value, base_weights[name]) for name, value in again.unet.state_dict().items())


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_closed_early_is_resumed_to_the_adapter_of_an_unbroken_one(stop: int, run: Path, tmp_path: Path) -> None:
    own = RunFolder.open(run).read_settings()
    job = api.Job.tune(own.model_copy(update={"edit": (), "validation_steps": None}), out=tmp_path / "broken")
    for each in job:
        if each.step and each.step.number == stop:
            job.close()
            break
    with pytest.raises(SettingsError, match="lora_rank cannot change"):
        api.resume(tmp_path / "broken", lora_rank=4)
    api.resume(tmp_path / "broken")
    assert same(run, tmp_path / "broken")


def test_a_finished_run_is_tuned_on(base: Path, clip: Path, tmp_path: Path) -> None:
    out = api.tune(clip, "a square", base=str(base), out=tmp_path / "run", **LOW)
    first = (out / "adapter/adapter.safetensors").read_bytes()
    api.resume(out, max_train_steps=5)
    assert (out / "adapter/adapter.safetensors").read_bytes() != first
    with pytest.raises(RunError, match="tuned to its end"):
        api.resume(out)


def test_an_adapter_of_whole_matrices_is_not_tuned_on_as_loras(base: Path, clip: Path, tmp_path: Path) -> None:
    run = api.tune(clip, "a square", base=str(base), out=tmp_path / "run", **LOW | {"lora_rank": None})
    settings = RunFolder(run).settings
    settings.write_text(settings.read_text().replace("lora_rank: null", "lora_rank: 2"))
    with pytest.raises(RunError, match="has no .*lora_A"):
        api.resume(run, max_train_steps=5)


def test_half_precision_gives_the_same_edit_at_once_and_later(base: Path, clip: Path, tmp_path: Path) -> None:
    options = LOW | {"mixed_precision": "bf16", "gradient_checkpointing": True}
    run = api.tune(clip, "a square", edit="a circle", base=str(base), out=tmp_path / "run", **options)
    (later,) = api.edit(run, "a circle")
    assert (read(later / "frames").frames_THWC == read(run / "edits/000-a-circle/frames").frames_THWC).all()


def test_the_memory_estimate_has_fewer_trained_numbers(base: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(base)
    plain, low = (TuneSettings(video="-", prompt="-", lora_rank=rank) for rank in (None, 2))
    size = memory.Size(8, 64, 64, 8)
    whole, small = (memory.Model.of(pipe, each, 4, casts=False) for each in (plain, low))
    assert small.trainable == sum(parameter.numel() for parameter in tuning(lora_rank=2).parameters.values())
    assert small.trainable < whole.trainable / 2 and small.tuning(low, size) < whole.tuning(plain, size)


# With other weights


def test_a_style_lora_comes_and_goes_fused_or_not(run: Path, tmp_path: Path) -> None:
    style.lora(tmp_path)
    image = StableDiffusionPipeline.from_pretrained(RunFolder(run).read_settings().base)
    adapter, before = Adapter.load(run / "adapter"), image.unet.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    adapter.attach(image.unet)
    tuned = predicted(image.unet)
    image.load_lora_weights(tmp_path)
    styled = predicted(image.unet)
    assert (styled - tuned).abs().max() > 1e-3
    image.fuse_lora()
    assert torch.allclose(predicted(image.unet), styled, atol=1e-5)
    image.unfuse_lora()
    image.unload_lora_weights()
    assert torch.allclose(predicted(image.unet), tuned, atol=1e-5)

    first = StableDiffusionPipeline.from_pretrained(RunFolder(run).read_settings().base)
    first.load_lora_weights(tmp_path)
    attached = adapter.attach(first.unet)
    assert torch.allclose(predicted(first.unet), styled, atol=1e-5)
    first.unload_lora_weights()
    attached.detach()
    assert all(torch.equal(value, before[name]) for name, value in first.unet.state_dict().items())


def test_edits_take_a_style_and_another_base(run: Path, base: Path, tmp_path: Path) -> None:
    style.lora(tmp_path)
    plain = read(run / "edits/000-a-circle/frames").frames_THWC
    (styled,) = api.edit(run, "a circle", lora=(str(tmp_path / "pytorch_lora_weights.safetensors"),))
    (same_base,) = api.edit(run, "a circle", edit_model=str(base))
    assert (read(styled / "frames").frames_THWC != plain).any()
    assert (read(same_base / "frames").frames_THWC == plain).all()


def test_a_base_of_another_shape_is_refused_and_left_as_it_was(run: Path) -> None:
    other = image_unet(block_out_channels=(24, 32))
    with pytest.raises(AdapterError, match="does not fit this UNet"):
        Adapter.load(run / "adapter").attach(other)
    assert not any("temp" in name for name in other.state_dict())


@pytest.mark.parametrize(("to", "out"), [("official", "there"), ("diffusers", "there"), ("mindone", "there.ckpt")])
def test_other_programs_get_whole_matrices(to: str, out: str, run: Path, base: Path, tmp_path: Path) -> None:
    report = api.convert(run / "adapter", tmp_path / out, to=to)
    assert (report.missing, report.different) == ([], [])
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    Adapter.load(run / "adapter").attach(unet)
    found = read_checkpoint(tmp_path / out).tensors
    for name, value in unet.state_dict().items():
        assert torch.equal(found[f"unet.{name}"].read(), value), name


def test_the_lora_for_image_programs_is_that_of_the_queries(run: Path, base: Path, tmp_path: Path) -> None:
    report = api.convert(run / "adapter", tmp_path / "queries.safetensors", to="lora", rank=2)
    assert report.error is not None and report.error < 1e-4
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.load_lora_weights(tmp_path / "queries.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    inflated = image_unet()
    inflate(inflated, Inflation(temporal_init="copy"))
    weights = dict(inflated.named_parameters())
    for name, value in merged(Adapter.load(run / "adapter").tensors, weights).items():
        if "attn_temp" not in name:
            assert torch.allclose(pipe.unet.state_dict()[name], value, atol=1e-5), name


def test_an_adapter_is_converted_and_adopted_as_it_is(run: Path, base: Path, clip: Path, tmp_path: Path) -> None:
    api.convert(run / "adapter", tmp_path / "adapter", to="adapter", base=str(base))
    ours, theirs = Adapter.load(tmp_path / "adapter"), Adapter.load(run / "adapter")
    assert ours.inflation == theirs.inflation and ours.tensors.keys() == theirs.tensors.keys()
    adopted = api.adopt(clip, "a square", run / "adapter", base=str(base), out=tmp_path / "adopted", num_frames=3)
    assert Adapter.load(adopted / "adapter").tensors.keys() == theirs.tensors.keys()
