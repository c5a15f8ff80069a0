"""Kernels and CUDA graphs on a GPU agree with torch."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from tests.kernel_cases import attentions, error, group_norms, small_work, worst
from tuneavideo import kernels, miniature
from tuneavideo.kernels import channels_last, graphs
from tuneavideo.method.graphs import recording
from tuneavideo.method.inflate import VideoUNet, inflate
from tuneavideo.method.noise import NoiseSchedule
from tuneavideo.method.tuning import Tuning
from tuneavideo.settings import TuneSettings
from tuneavideo.training.optimizers import make_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
CUDA = "cuda"


def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "works_on", lambda _: False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kernels_compute_what_torch_does(precision):
    dtype, bound = {"fp32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 5e-2)}[precision]  # sums cancel
    cases = [*group_norms(), *small_work(), *(attentions(24) if precision == "bf16" else ())]
    assert not {case[0]: found for case in cases if (found := worst(case, dtype, CUDA)) > bound}


def small_unet(dtype: torch.dtype = torch.float32) -> VideoUNet:
    unet = UNet2DConditionModel.from_pretrained(miniature.MODEL / "unet").to(CUDA, dtype)
    video = inflate(unet.requires_grad_(False))
    for name, parameter in unet.named_parameters():
        if "attn_temp" in name:
            torch.nn.init.uniform_(parameter, -0.1, 0.1)
    channels_last.optimise(unet)
    return video


def random_inputs(video: VideoUNet, clips: int, frames: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    config = video.unet.config
    text = torch.randn(clips, 9, config.cross_attention_dim, device=CUDA)
    return torch.randn(clips, config.in_channels, frames, 8, 12, device=CUDA), torch.tensor(500, device=CUDA), text


@pytest.mark.parametrize(("clips", "frames", "inject"), [(1, 1, False), (2, 5, False), (3, 5, True)])
@torch.no_grad()
def test_a_unet_predicts_the_same_with_kernels(clips, frames, inject, monkeypatch):
    torch.manual_seed(0)
    video = small_unet()
    video.clip.inject = inject
    inputs = random_inputs(video, clips, frames)
    found = video(*inputs)
    without_kernels(monkeypatch)
    assert error(found, video(*inputs)) < 2e-3  # convolutions compute in TF32


@torch.no_grad()
def test_a_recorded_call_takes_new_inputs():
    video = small_unet(torch.bfloat16)
    replayed = recording(video)
    calls = [random_inputs(video, 2, 4) for _ in range(4)]
    found = [replayed(*inputs) for inputs in calls]
    assert max(error(y, video(*inputs)) for y, inputs in zip(found, calls, strict=True)) < 1e-2
    assert error(found[2], found[3]) > 0.1


def test_recorded_steps_have_the_losses_of_others(monkeypatch):
    def losses(recorded: bool) -> list[float]:
        monkeypatch.setattr(graphs, "enabled", recorded)
        torch.manual_seed(0)
        video = small_unet()
        x, _, text = random_inputs(video, 1, 4)
        settings = TuneSettings(video="-", prompt="-", max_train_steps=8, gradient_checkpointing=False)
        scheduler = DDIMScheduler.from_pretrained(miniature.MODEL / "scheduler")
        moments = {"mean": x, "std": torch.ones_like(x)}
        tuning = Tuning(
            video,
            NoiseSchedule.of(scheduler),
            moments,
            text,
            settings,
            Accelerator(mixed_precision="bf16"),
            make_optimizer,
        )
        steps = [(step.loss, bool(tuning.recorder.recording)) for step in tuning]
        assert steps[-1][1] == recorded
        return [loss for loss, _ in steps]

    assert losses(True) == pytest.approx(losses(False), rel=1e-2)


@torch.no_grad()
def test_a_vae_gives_the_same_pictures_with_kernels(monkeypatch):
    vae = AutoencoderKL.from_pretrained(miniature.MODEL / "vae").to(CUDA)
    latents = torch.randn(3, vae.config.latent_channels, 8, 12, device=CUDA)
    channels_last.optimise(vae)
    found = vae.decode(latents).sample
    without_kernels(monkeypatch)
    assert error(found, vae.decode(latents).sample) < 2e-3
