"""The three layers that make an image UNet see a clip.

Shape letters: B clips, T frames, N = B*T images, L tokens of an image, M tokens looked at, H heads, D head channels,
C channels. Each layer is a subclass of the image layer it takes the place of, and shares one `Clip` that says how
many frames the batch of images holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import group_norm, scaled_dot_product_attention

# Fast attention kernels take a batch of at most 65,535; temporal attention has one entry per clip and site.
MAX_SITES = 32768


@dataclass
class Clip:
    """How the images of a batch make up clips; one object, shared by all layers of a UNet and set by `VideoUNet`.

    An inflated UNet therefore serves one request at a time.
    """

    frames: int = 1
    references: tuple[str, ...] = ("first", "previous")


# Frames that a frame may refer to: from the tokens of all frames, B T L C, to those seen by each.
REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda x_BTLC: x_BTLC[:, :1].expand_as(x_BTLC),
    "middle": lambda x_BTLC: x_BTLC[:, x_BTLC.shape[1] // 2, None].expand_as(x_BTLC),
    "previous": lambda x_BTLC: torch.cat([x_BTLC[:, :1], x_BTLC[:, :-1]], dim=1),
    "own": lambda x_BTLC: x_BTLC,
}


def referred(x_NLC: Tensor, frames: int, references: Sequence[str]) -> Tensor:
    """For every frame, the tokens of the frames it refers to, one after the other: `N L C` to `N M C`.

    Tune-A-Video, eq. 4: the first frame and the one before (frame max(t-1, 0)).
    """
    x_BTLC = rearrange(x_NLC, "(b t) l c -> b t l c", t=frames)
    x_BTMC = torch.cat([REFERENCES[name](x_BTLC) for name in references], dim=2)
    return rearrange(x_BTMC, "b t m c -> (b t) m c")


class SparseCausalAttention(Attention):
    """Self-attention of an image UNet that looks at the first and the previous frame (Tune-A-Video, eq. 4).

    Keys and values are projected once per token and then gathered. It computes for itself instead of through a
    processor: diffusers replaces processors when slicing, fusing or loading IP-Adapters.
    """

    clip: Clip
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList

    def forward(self, hidden_states: Tensor, *_, **__) -> Tensor:
        """`N L C` to `N L C`."""
        frames, references = self.clip.frames, self.clip.references
        q_NLC = self.to_q(hidden_states)
        k_NMC = referred(self.to_k(hidden_states), frames, references)
        v_NMC = referred(self.to_v(hidden_states), frames, references)
        q_NHLD, k_NHMD, v_NHMD = (rearrange(x, "n l (h d) -> n h l d", h=self.heads) for x in (q_NLC, k_NMC, v_NMC))
        y_NHLD = scaled_dot_product_attention(q_NHLD, k_NHMD, v_NHMD, scale=self.scale)
        return self.to_out[1](self.to_out[0](rearrange(y_NHLD, "n h l d -> n l (h d)")))


class VideoBlock(BasicTransformerBlock):
    """A transformer block of an image UNet, followed by attention along time at every site."""

    clip: Clip
    norm_temp: nn.LayerNorm
    attn_temp: Attention

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """`N L C` to `N L C`."""
        x_NLC = super().forward(hidden_states, *args, **kwargs)
        x_STC = rearrange(x_NLC, "(b t) l c -> (b l) t c", t=self.clip.frames)
        y_STC = torch.cat([self.attn_temp(self.norm_temp(part)) for part in x_STC.split(MAX_SITES)])
        return x_NLC + rearrange(y_STC, "(b l) t c -> (b t) l c", l=x_NLC.shape[1])


class ClipGroupNorm(nn.GroupNorm):
    """Group normalisation whose statistics span all frames of a clip."""

    clip: Clip

    def forward(self, input: Tensor) -> Tensor:
        """`N C H W` to `N C H W`."""
        if self.clip.frames == 1:
            return super().forward(input)
        x_BCTHW = rearrange(input, "(b t) c h w -> b c t h w", t=self.clip.frames)
        y_BCTHW = group_norm(x_BCTHW, self.num_groups, self.weight, self.bias, self.eps)
        return rearrange(y_BCTHW, "b c t h w -> (b t) c h w")
