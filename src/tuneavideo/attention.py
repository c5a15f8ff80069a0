"""The three layers that make an image UNet see a clip.

Shape letters: B clips, T frames, N = B*T images, L tokens of an image, M tokens looked at, H heads, D head channels,
C channels. Each layer is a subclass of the image layer it takes the place of, and shares one `Clip` that says how
many frames the batch of images holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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

    An inflated UNet therefore serves one request at a time. With `led`, every clip of the batch looks where the first
    one does: attention takes queries and keys of that one, and values of its own (Plug-and-Play, section 4).
    """

    clips: int = 1
    frames: int = 1
    references: tuple[str, ...] = ("first", "previous")
    led: bool = False

    def leaders(self, x: Tensor) -> Tensor:
        """The part of a batch that decides where to look."""
        return x[: len(x) // self.clips] if self.led else x

    def followed(self, x: Tensor) -> Tensor:
        """What was made of the leaders, for the whole batch."""
        return x.repeat(self.clips, 1, 1) if self.led else x


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
        leaders = self.clip.leaders(hidden_states)
        q_NLC = self.clip.followed(self.to_q(leaders))
        k_NMC = self.clip.followed(referred(self.to_k(leaders), frames, references))
        v_NMC = referred(self.to_v(hidden_states), frames, references)
        return attend(self, q_NLC, k_NMC, v_NMC)


class TemporalAttention(Attention):
    """Attention along time at every site."""

    clip: Clip
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList

    def forward(self, hidden_states: Tensor, *_, **__) -> Tensor:
        """`S T C` to `S T C`, for S sites of all clips."""
        leaders = self.clip.leaders(hidden_states)
        q_STC, k_STC = self.clip.followed(self.to_q(leaders)), self.clip.followed(self.to_k(leaders))
        parts = (x.split(MAX_SITES) for x in (q_STC, k_STC, self.to_v(hidden_states)))
        return torch.cat([attend(self, *part) for part in zip(*parts, strict=True)])


class PromptAttention(Attention):
    """Cross-attention of an image UNet, which in a led clip asks the prompt what the leader asks its own.

    A new subject so appears where the old one was (Prompt-to-Prompt, section 3, with queries in place of maps).
    """

    clip: Clip

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """`N L C` to `N L C`."""
        return super().forward(self.clip.followed(self.clip.leaders(hidden_states)), *args, **kwargs)


def attend(attn: Attention, q_NLC: Tensor, k_NMC: Tensor, v_NMC: Tensor) -> Tensor:
    """Scaled-dot-product attention with the heads and the output projection of `attn`: `N L C`."""
    q_NHLD, k_NHMD, v_NHMD = (rearrange(x, "n l (h d) -> n h l d", h=attn.heads) for x in (q_NLC, k_NMC, v_NMC))
    y_NHLD = scaled_dot_product_attention(q_NHLD, k_NHMD, v_NHMD, scale=attn.scale)
    out: Any = attn.to_out
    return out[1](out[0](rearrange(y_NHLD, "n h l d -> n l (h d)")))


class VideoBlock(BasicTransformerBlock):
    """A transformer block of an image UNet, followed by attention along time at every site."""

    clip: Clip
    norm_temp: nn.LayerNorm
    attn_temp: TemporalAttention

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """`N L C` to `N L C`."""
        x_NLC = super().forward(hidden_states, *args, **kwargs)
        x_STC = rearrange(x_NLC, "(b t) l c -> (b l) t c", t=self.clip.frames)
        y_STC = self.attn_temp(self.norm_temp(x_STC))
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
