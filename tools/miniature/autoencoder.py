"""The autoencoder of the miniature: 64x64 pictures to 16x16 latents and back, a quarter of the side."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tools.miniature.muon import Pair
from tools.miniature.training import Run, Settings, generator, learn, load, pictures, rank, save, world_size
from tools.miniature.world import PIXELS, World, random_scene
from torch import Tensor, nn

CHANNELS = 8
KL_WEIGHT = 1e-6
WHOLE_FROM = 0.67
ANCHOR = 0.1
"""Weight of the latents' distance from those of the autoencoder that training starts from."""
LATENT_NOISE = 0.1
"""Strongest noise the decoder learns to bear, against latents of standard deviation one."""
TO_CHROMA = ((0.5, -0.5, 0.0), (-0.25, -0.25, 0.5))
"""Red against green, and blue against both."""


def new_autoencoder(channels: int = CHANNELS) -> AutoencoderKL:
    """Initialise the autoencoder; the posterior starts narrow, since its noise would stall the training."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, norm_num_groups=8, latent_channels=channels,
        mid_block_add_attention=False, sample_size=PIXELS,
    )  # fmt: skip
    nn.init.constant_(vae.quant_conv.bias[channels:].data, -6.0)
    nn.init.zeros_(vae.quant_conv.weight[channels:].data)
    return vae


class PatchHead(nn.Module):
    """A linear decoder of the latents, used in training only: it makes them encode each patch's colours early."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.read = nn.Conv2d(channels, 48, 1)

    def forward(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(self.read(latents), 4)


def chroma(pictures_N3HW: Tensor) -> Tensor:
    """Compute the two colour differences of every pixel."""
    return torch.einsum("kc,nchw->nkhw", torch.tensor(TO_CHROMA, device=pictures_N3HW.device), pictures_N3HW)


def reconstruction_loss(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Compute L1 with terms for mean colour of patches, hue, large errors, and edges."""
    error = drawn - wanted
    pooled = F.avg_pool2d(error, 4).abs().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + pooled + chroma(error).abs().mean() + 2 * error.square().mean() + 0.5 * edges


def train(settings: Settings, start_from: Path | None = None) -> None:
    """Train encoder and decoder for the settings' steps; the state is `autoencoder.pt`.

    An autoencoder to start from keeps its latents near what they were, so that its UNet goes on as well.
    """
    torch.manual_seed(settings.seed)
    vae = new_autoencoder()
    before = AutoencoderKL.from_pretrained(start_from, subfolder="vae").to(settings.device) if start_from else None
    if before:
        vae.load_state_dict(before.state_dict())
    head = PatchHead(vae.config.latent_channels)
    both = nn.ModuleList([vae, head]).to(settings.device, memory_format=torch.channels_last)
    run, world = Run(settings, "autoencoder", Pair(both, settings.rate), model=both), World.open(settings.build)
    for step, progress in run:
        wanted = _batch(world, settings, step, progress)
        posterior = vae.encode(wanted).latent_dist
        latents = posterior.sample()
        loss = reconstruction_loss(vae.decode(latents).sample, wanted) + KL_WEIGHT * posterior.kl().mean()
        loss = loss + (1 - progress) * F.l1_loss(head(latents), wanted)
        if before:
            loss = loss + ANCHOR * _moved(before, wanted, posterior.mean)
        learn(run, loss, both.parameters())
    run.log(f"{psnr(vae, world, settings.device):.2f} dB")


def _moved(before: AutoencoderKL, wanted: Tensor, latents: Tensor) -> Tensor:
    """Compute the mean squared distance of latents from those of another autoencoder, in its standard deviations."""
    with torch.no_grad():
        old = before.encode(wanted).latent_dist.mean
    return F.mse_loss(latents, old) * before.config.scaling_factor**2


def _batch(world: World, settings: Settings, step: int, progress: float) -> Tensor:
    """Draw a batch: crops at first, for many cheap steps; whole pictures, as in use, in the last third."""
    rng = generator("autoencoder", settings.seed, step, rank(), world_size())
    if progress > WHOLE_FROM:
        return pictures(world, [random_scene(rng, held_out=None) for _ in range(settings.batch // 2)], settings.device)
    scenes = [random_scene(rng, held_out=None) for _ in range(settings.batch)]
    whole = pictures(world, scenes, settings.device)
    return torch.cat([_crop(whole, rng) for _ in range(2)])


def _crop(whole: Tensor, rng: random.Random) -> Tensor:
    """Crop a quarter of each picture, so that steps are cheaper."""
    corners = [(4 * rng.randint(0, 8), 4 * rng.randint(0, 8)) for _ in whole]
    half = PIXELS // 2
    return torch.stack([w[:, y : y + half, x : x + half] for w, (x, y) in zip(whole, corners, strict=True)])


def tune_decoder(settings: Settings) -> None:
    """Train the decoder alone on fixed latents, with noise as a UNet leaves it; the state is `decoder.pt`."""
    torch.manual_seed(settings.seed)
    vae = finished(settings.build, settings.device)
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    decoder.to(memory_format=torch.channels_last)
    run, world = Run(settings, "decoder", Pair(decoder, settings.rate), model=decoder), World.open(settings.build)
    for step, _ in run:
        wanted = _batch(world, settings, step, 1.0)
        with torch.no_grad():
            latents = vae.encode(wanted).latent_dist.mode()
            strength = torch.rand(len(latents), 1, 1, 1, device=latents.device) * LATENT_NOISE
            latents += torch.randn_like(latents) * strength / vae.config.scaling_factor
        learn(run, reconstruction_loss(vae.decode(latents).sample, wanted), decoder.parameters())
    run.log(f"{psnr(vae, world, settings.device):.2f} dB")


@torch.no_grad()
def psnr(vae: AutoencoderKL, world: World, device: str, count: int = 64, seed: str = "held out") -> float:
    """Measure the mean PSNR in dB over held-out drawings."""
    rng = generator("psnr", seed)
    wanted = pictures(world, [random_scene(rng, held_out=None) for _ in range(count)], device)
    drawn = vae.decode(vae.encode(wanted).latent_dist.mode()).sample.clamp(-1, 1)
    error = ((drawn - wanted) / 2).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def scaling_factor(vae: AutoencoderKL, world: World, device: str, count: int = 512) -> float:
    """Compute the factor that scales the latents of training scenes to a standard deviation of one."""
    rng = generator("scaling")
    latents = [
        vae.encode(pictures(world, [random_scene(rng) for _ in range(64)], device)).latent_dist.mode()
        for _ in range(math.ceil(count / 64))
    ]
    return 1 / torch.cat(latents).std().item()


def finished(build: Path, device: str = "cpu") -> AutoencoderKL:
    """Load the trained autoencoder with its scaling factor, frozen."""
    state = load(build / "autoencoder.pt")
    if state is None:
        raise FileNotFoundError(f"{build} holds no autoencoder.pt: run the stage 'autoencoder' first")
    weights = {name.removeprefix("0."): w for name, w in state["model"].items() if name.startswith("0.")}
    vae = new_autoencoder(weights["post_quant_conv.weight"].shape[0])
    vae.load_state_dict(weights)
    if tuned := load(build / "decoder.pt"):
        nn.ModuleList([vae.post_quant_conv, vae.decoder]).load_state_dict(tuned["model"])
    vae.to(device).requires_grad_(False).eval()
    vae.register_to_config(scaling_factor=scaling_factor(vae, World.open(build), device))
    return vae


def adopt(build: Path, model: Path) -> None:
    """Take the autoencoder of an exported model, unless `build` already has one of its own."""
    if (build / "autoencoder.pt").exists():
        return
    weights = AutoencoderKL.from_pretrained(model, subfolder="vae").state_dict()
    before = json.loads((model / "training.json").read_text())["training"]
    save({"model": {f"0.{name}": w for name, w in weights.items()}, "before": before}, build / "autoencoder.pt")
