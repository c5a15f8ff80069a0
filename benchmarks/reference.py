"""Reference implementation of the published method, the baseline of the measurements.

VAE and text encoder run at every step, the text is repeated for every frame, attention scores are materialised, every
block is computed twice, and Adam takes every tuned tensor by itself. Four prompts cost one inversion and four guided
samplings, each in turn. Nothing here is slower than it was there: what it ran in one kernel runs in one.

Its re-entrant checkpointing left the layers of the down path untrained, and with them their recomputation and their
gradients. `reentrant=True` does that too; the reference trains what it says it trains.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import group_norm, mse_loss
from torch.utils.checkpoint import checkpoint

from benchmarks.sized import Parts
from tuneavideo.method.attention import ClipGroupNorm, ClipLayout, SparseCausalAttention, TextAttention, VideoBlock
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import inflate, trainable_parameters
from tuneavideo.method.noise import NoiseSchedule, add_noise, ddim_move, split, target

TUNED = ("attn1.to_q", "attn2.to_q", "attn_temp")


def scores(attention: Attention, q_NLC: Tensor, k_NMC: Tensor, v_NMC: Tensor) -> Tensor:
    """Compute attention with its whole map in memory."""
    heads = attention.heads
    q, k, v = (rearrange(x, "n l (h d) -> (n h) l d", h=heads) for x in (q_NLC, k_NMC, v_NMC))
    seen = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(-1, -2), beta=0, alpha=attention.scale).softmax(dim=-1)
    return rearrange(seen @ v, "(n h) l d -> n l (h d)", h=heads)


class PlainSparseCausalAttention(Attention):
    clip: ClipLayout

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        frames = self.clip.frames
        q_NLC = self.to_q(hidden_states)
        before = [max(t - 1, 0) for t in range(frames)]

        def gathered(x_NLC: Tensor) -> Tensor:
            x_BTLC = rearrange(x_NLC, "(b t) l c -> b t l c", t=frames)
            x_BTMC = torch.cat([x_BTLC[:, [0] * frames], x_BTLC[:, before]], dim=2)
            return rearrange(x_BTMC, "b t m c -> (b t) m c")

        y_NLC = scores(self, q_NLC, gathered(self.to_k(hidden_states)), gathered(self.to_v(hidden_states)))
        return self.to_out[0](y_NLC)


class PlainBlock(BasicTransformerBlock):
    clip: ClipLayout
    norm_temp: nn.LayerNorm
    attn_temp: Attention

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        x_NLC = super().forward(hidden_states, *args, **kwargs)
        x_STC = rearrange(x_NLC, "(b t) l c -> (b l) t c", t=self.clip.frames)
        x_STC = self.attn_temp(self.norm_temp(x_STC)) + x_STC
        return rearrange(x_STC, "(b l) t c -> (b t) l c", l=x_NLC.shape[1])


class PlainClipNorm(nn.GroupNorm):
    clip: ClipLayout

    def forward(self, input: Tensor) -> Tensor:
        x_BCTHW = rearrange(input, "(b t) c h w -> b c t h w", t=self.clip.frames)
        y_BCTHW = group_norm(x_BCTHW, self.num_groups, self.weight, self.bias, self.eps)
        return rearrange(y_BCTHW, "b c t h w -> (b t) c h w")


_PLAIN = {
    VideoBlock: PlainBlock,
    SparseCausalAttention: PlainSparseCausalAttention,
    TextAttention: Attention,
    ClipGroupNorm: PlainClipNorm,
}


@dataclass
class Reference:
    """The published method on a base's networks.

    Attributes:
        parts: The base's networks, taken over; the UNet still an image UNet, or inflated.
        levels: Noise levels of the base.
        frozen: Tuned layers that do not learn after all: those whose name begins so.
        reentrant: Checkpoint as the published code did, which keeps the down path from learning.
    """

    parts: Parts
    levels: NoiseSchedule
    frozen: tuple[str, ...] = ()
    reentrant: bool = False
    tuned: dict[str, nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        unet = self.parts.unet
        if not any(isinstance(layer, VideoBlock) for layer in unet.modules()):
            inflate(unet)
        self.clip = next(layer.clip for layer in unet.modules() if isinstance(layer, VideoBlock))
        for network in (unet, self.parts.vae):
            for layer in network.modules():
                layer.__class__ = _PLAIN.get(type(layer), type(layer))
                if isinstance(layer, Attention) and not isinstance(layer, PlainSparseCausalAttention):
                    layer.set_processor(AttnProcessor())
        for network in (unet, self.parts.vae, self.parts.text):
            if network is not None:
                network.requires_grad_(False)
        self.tuned = trainable_parameters(unet.train(), TUNED, self.frozen)
        for parameter in self.tuned.values():
            parameter.requires_grad_(True)
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=self.reentrant))
        for layer in unet.mid_block.modules():  # as published: the block in the middle is computed once
            if hasattr(layer, "gradient_checkpointing"):
                layer.gradient_checkpointing = False

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.tuned.values(), lr=3e-5, foreach=False, fused=False)

    def unet(self, x_BCTHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        """Predict noise for clips; the text is repeated for every frame."""
        frames = self.clip.frames = x_BCTHW.shape[2]
        x_NCHW = rearrange(x_BCTHW.to(self.parts.unet.dtype), "b c t h w -> (b t) c h w")
        text_NLD = text_BLD.repeat_interleave(frames, dim=0)
        conditions = Conditions(text_NLD, self.parts.pooled(len(x_NCHW), str(x_NCHW.device)), stride=self.parts.stride)
        added = conditions.added(*x_NCHW.shape[-2:])
        t_N = t_B.repeat_interleave(frames)
        y_NCHW = self.parts.unet(x_NCHW, t_N, text_NLD, added_cond_kwargs=added, return_dict=False)[0]
        return rearrange(y_NCHW, "(b t) c h w -> b c t h w", t=frames)

    @torch.no_grad()
    def encoded(self, pixels_TCHW: Tensor) -> Tensor:
        """Encode a clip to latents `1 C T H W`, sampled from the posterior."""
        drawn = self.parts.vae.encode(pixels_TCHW).latent_dist.sample()
        return rearrange(drawn, "t c h w -> 1 c t h w") * self.parts.vae.config.scaling_factor

    @torch.no_grad()
    def words(self, ids_BL: Tensor) -> Tensor:
        """Return text embeddings `B L D`; zeros if the text encoder is not measured."""
        if self.parts.text is None:
            return torch.zeros(*ids_BL.shape, self.parts.unet.config.cross_attention_dim, device=ids_BL.device)
        return self.parts.text(ids_BL)[0]

    def loss(self, latents_BCTHW: Tensor, noise_BCTHW: Tensor, t_B: Tensor, text_BLD: Tensor) -> Tensor:
        alpha_B = self.levels.alphas.to(t_B.device)[t_B]
        prediction = self.unet(add_noise(latents_BCTHW, noise_BCTHW, alpha_B), t_B, text_BLD)
        wanted = target(latents_BCTHW, noise_BCTHW, alpha_B, self.levels.prediction_type)
        return mse_loss(prediction.float(), wanted.float())

    def gradients(self, pixels_TCHW: Tensor, ids_BL: Tensor) -> Tensor:
        """Compute the loss of a step from pixels and words, with its gradients."""
        latents = self.encoded(pixels_TCHW)
        t_B = torch.randint(len(self.levels.alphas), (1,), device=latents.device)
        loss = self.loss(latents, torch.randn_like(latents), t_B, self.words(ids_BL))
        loss.backward()
        return loss

    def step(self, optimizer: torch.optim.Optimizer, pixels_TCHW: Tensor, ids_BL: Tensor) -> Tensor:
        """Run one tuning step."""
        loss = self.gradients(pixels_TCHW, ids_BL)
        nn.utils.clip_grad_norm_(self.tuned.values(), 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def inverted(self, x_BCTHW: Tensor, empty_BLD: Tensor, grid: list[int]) -> Tensor:
        """Invert latents by DDIM along rising timesteps."""
        alpha = self.levels.final_alpha
        for t in grid:
            output = self.unet(x_BCTHW, torch.tensor([t], device=x_BCTHW.device), empty_BLD)
            clean, noise = split(x_BCTHW, output, alpha, self.levels.prediction_type)
            alpha = self.levels.alphas[t]
            x_BCTHW = ddim_move(clean, noise, alpha)
        return x_BCTHW

    @torch.no_grad()
    def guided(self, x_BCTHW: Tensor, t: int, texts_2LD: Tensor, scale: float) -> Tensor:
        """Predict noise with classifier-free guidance."""
        both = torch.cat([x_BCTHW, x_BCTHW])
        without, towards = self.unet(both, torch.tensor([t, t], device=both.device), texts_2LD).chunk(2)
        return without + scale * (towards - without)

    @torch.no_grad()
    def sampled(self, x_BCTHW: Tensor, texts_2LD: Tensor, grid: list[int], scale: float) -> Tensor:
        """Sample by DDIM along falling timesteps."""
        for t, after in zip(grid, [*grid[1:], None], strict=True):
            output = self.guided(x_BCTHW, t, texts_2LD, scale)
            clean, noise = split(x_BCTHW, output, self.levels.alphas[t], self.levels.prediction_type)
            alpha = self.levels.final_alpha if after is None else self.levels.alphas[after]
            x_BCTHW = ddim_move(clean, noise, alpha)
        return x_BCTHW

    @torch.no_grad()
    def decoded(self, x_BCTHW: Tensor) -> Tensor:
        """Decode a clip to pixels `T C H W`, all frames at once."""
        latents = rearrange(x_BCTHW, "1 c t h w -> t c h w") / self.parts.vae.config.scaling_factor
        return self.parts.vae.decode(latents).sample
