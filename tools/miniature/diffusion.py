"""The text encoder and the UNet of the miniature, trained together to predict noise in the latents of drawings."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tools.miniature import autoencoder
from tools.miniature.muon import Pair
from tools.miniature.text import POSITIONS, new_text_encoder, new_tokenizer
from tools.miniature.training import Run, Settings, generator, learn, load, pictures, rank, save, world_size
from tools.miniature.world import PIXELS, Scene, World, random_caption, random_scene, words
from torch import Tensor, nn
from transformers import CLIPTextModel

SHARD = 2048
MIN_SNR = ((0.0, 1.0), (0.5, 5.0))
"""From which share of the training on, which gamma: shapes first, which much noise hides, and fine detail last."""
EMA = 0.99


def new_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False,
        set_alpha_to_one=False,
    )  # fmt: skip


def new_unet(channels: int) -> UNet2DConditionModel:
    """Self- and cross-attention at 16x16, 8x8 and 4x4; `attention_head_dim` counts heads, as it does for SD 1."""
    return UNet2DConditionModel(
        sample_size=PIXELS // 4, in_channels=channels, out_channels=channels, block_out_channels=(32, 80, 160),
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3, attention_head_dim=(2, 4, 4), cross_attention_dim=128,
        norm_num_groups=16,
    )  # fmt: skip


class Painter(nn.Module):
    """Text encoder and UNet, trained together."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.text: CLIPTextModel = new_text_encoder(new_tokenizer(words()))
        self.unet: UNet2DConditionModel = new_unet(channels)

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return self.unet(noisy, t, self.text(tokens).last_hidden_state).sample


@dataclass(slots=True)
class Shard:
    """Scenes and the moments of their latents, `N 2C 16 16` in half precision."""

    scenes: list[Scene]
    moments: Tensor


def shard_scenes(seed: int, number: int) -> list[Scene]:
    """Return the scenes of one shard, which its number determines."""
    rng = generator("shard", seed, number)
    return [random_scene(rng) for _ in range(SHARD)]


@torch.no_grad()
def draw_shards(settings: Settings, count: int) -> None:
    """Draw and encode what is missing of `count` shards, one file each; divided among the processes."""
    folder, world, vae = settings.build / "latents", World.open(settings.build), None
    for number in range(rank(), count, world_size()):
        file = folder / f"shard-{number:03}.pt"
        if file.exists():
            continue
        vae = vae or autoencoder.finished(settings.build, settings.device)
        scenes = shard_scenes(settings.seed, number)
        parts = [
            vae.encode(pictures(world, scenes[start : start + 64], settings.device)).latent_dist.parameters.half().cpu()
            for start in range(0, SHARD, 64)
        ]
        save({"moments": torch.cat(parts)}, file)


def open_shards(settings: Settings) -> list[Shard]:
    """Load the shards of this process."""
    files = sorted((settings.build / "latents").glob("shard-*.pt"))[rank() :: world_size()]
    return [Shard(shard_scenes(settings.seed, int(f.stem[-3:])), load(f)["moments"]) for f in files]


def timestep_shares(alphas: Tensor, progress: float) -> Tensor:
    """Running share of every timestep in training, min-SNR weights: drawn more seldom instead of counted less."""
    gamma = [gamma for start, gamma in MIN_SNR if progress >= start][-1]
    weight = (gamma * (1 - alphas) / alphas).clamp(max=1)
    return weight.cumsum(0) / weight.sum()


class Batches:
    """Batches of noisy latents that the number of the step determines."""

    def __init__(self, settings: Settings, scaling_factor: float) -> None:
        self.settings, self.shards, self.scaling_factor = settings, open_shards(settings), scaling_factor
        self.tokenizer = new_tokenizer(words())
        self.alphas = new_scheduler().alphas_cumprod.to(settings.device)

    def __call__(self, step: int, progress: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps, tokens, and the noise."""
        rng = generator("diffusion", self.settings.seed, step, rank(), world_size())
        noise_rng = torch.Generator().manual_seed(rng.getrandbits(62))
        chosen = [(rng.choice(self.shards), rng.randrange(SHARD)) for _ in range(self.settings.batch)]
        captions = [random_caption(shard.scenes[index], rng) for shard, index in chosen]
        moments = torch.stack([shard.moments[index] for shard, index in chosen]).float()
        mean, logvar = moments.chunk(2, dim=1)
        latents = mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn(mean.shape, generator=noise_rng)
        latents = latents * self.scaling_factor
        noise = torch.randn(latents.shape, generator=noise_rng)
        spread = (torch.arange(len(chosen)) + torch.rand(len(chosen), generator=noise_rng)) / len(chosen)
        device = self.settings.device
        shares = timestep_shares(self.alphas.cpu(), progress)
        t = torch.searchsorted(shares, spread).clamp(max=len(self.alphas) - 1).to(device)
        latents, noise = latents.to(device), noise.to(device)
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise, t, self.tokens(captions).to(device), noise

    def tokens(self, captions: list[str]) -> Tensor:
        return self.tokenizer(
            captions, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt"
        ).input_ids


def train(settings: Settings, start_from: Path | None = None) -> None:
    """Train for the settings' steps; the state, with the averaged weights under `ema`, is `diffusion.pt`."""
    vae = autoencoder.finished(settings.build)
    torch.manual_seed(settings.seed)
    painter = Painter(vae.config.latent_channels).to(settings.device, memory_format=torch.channels_last)
    if start_from:
        painter.text.load_state_dict(CLIPTextModel.from_pretrained(start_from, subfolder="text_encoder").state_dict())
        painter.unet.load_state_dict(UNet2DConditionModel.from_pretrained(start_from, subfolder="unet").state_dict())
    average = copy.deepcopy(painter).requires_grad_(False)
    run = Run(settings, "diffusion", Pair(painter, settings.rate), model=painter, ema=average)
    batches = Batches(settings, vae.config.scaling_factor)
    for step, progress in run:
        noisy, t, tokens, noise = batches(step, progress)
        learn(run, F.mse_loss(painter(noisy, t, tokens), noise), painter.parameters())
        _follow(average, painter, min(EMA, (1 + step) / (10 + step)))


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move averaged weights towards the model's."""
    ours, theirs = list(average.parameters()), list(model.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - decay)


def finished(build: Path, vae: AutoencoderKL) -> Painter:
    """Load the averaged text encoder and UNet of the last state."""
    state = load(build / "diffusion.pt")
    if state is None:
        raise FileNotFoundError(f"{build} holds no diffusion.pt: run the stage 'diffusion' first")
    painter = Painter(vae.config.latent_channels)
    painter.load_state_dict(state["ema"])
    return painter.requires_grad_(False).eval()
