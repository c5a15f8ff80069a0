"""The layers that make an image UNet see a clip.

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

from tuneavideo.kernels import tiles

# Fast attention kernels take a batch of at most 65,535; temporal attention has one entry per clip and site.
MAX_BATCH = 32768


@dataclass
class Clip:
    """How the images of a batch make up clips; one object, shared by all layers of a UNet and set by `VideoUNet`.

    An inflated UNet therefore serves one request at a time. With `led`, every clip of the batch looks where the first
    one does: attention takes queries and keys of that one, and values of its own (Plug-and-Play, section 4).
    """

    frames: int = 1
    references: tuple[str, ...] = ("first", "previous")
    clips: int = 1
    led: bool = False

    def leaders(self, x: Tensor) -> Tensor:
        """The part of a batch that decides where to look."""
        return x[: len(x) // self.clips] if self.led else x

    def followed(self, x: Tensor) -> Tensor:
        """What was made of the leaders, for the whole batch."""
        return x.repeat(self.clips, *(1,) * (x.ndim - 1)) if self.led else x


def previous(x_BTLC: Tensor, start: int, frames: int) -> Tensor:
    """Frame max(t-1, 0) of each."""
    before = x_BTLC[:, max(start - 1, 0) : frames - 1]
    return before if start else torch.cat([x_BTLC[:, :1], before], dim=1)


# Frames that a frame may refer to: of tokens B T L C, those that frames `start`, `start` + 1, ... (of T) look at.
REFERENCES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "first": lambda x_BTLC, start, frames: x_BTLC[:, :1].expand(-1, frames - start, -1, -1),
    "previous": previous,
    "own": lambda x_BTLC, start, frames: x_BTLC[:, start:],
}
# How many frames of a clip find nothing but frame 0 there; `first` never finds anything else.
ONLY_FIRST = {"previous": 2, "own": 1}


def only_first(frames: int, references: Sequence[str]) -> int:
    """How many frames at the start of a clip look at nothing but frame 0, however often."""
    return min([frames, *(ONLY_FIRST[name] for name in references if name in ONLY_FIRST)])


def referred(x_BTLC: Tensor, start: int, frames: int, references: Sequence[str]) -> Tensor:
    """For frames `start`, `start` + 1, ..., the tokens of the frames they refer to, one after the other: `B T M C`.

    Tune-A-Video, eq. 4: the first frame and the one before (frame max(t-1, 0)).
    """
    return torch.cat([REFERENCES[name](x_BTLC, start, frames) for name in references], dim=2)


class SparseCausalAttention(Attention):
    """Self-attention of an image UNet that looks at the first and the previous frame (Tune-A-Video, eq. 4).

    Keys and values are projected once per token that is looked at, and then gathered. Frames that would see frame 0
    twice see it once: attention to equal keys is the same. It computes for itself instead of through a processor:
    diffusers replaces processors when slicing, fusing or loading IP-Adapters.
    """

    clip: Clip
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList

    def forward(self, hidden_states: Tensor, *_, **__) -> Tensor:
        """`N L C` to `N L C`."""
        frames, references = self.clip.frames, self.clip.references
        x_BTLC = rearrange(hidden_states, "(b t) l c -> b t l c", t=frames)
        start = only_first(frames, references)
        last = frames if "own" in references else max(frames - 1, 1)  # nobody looks at the last frame
        leaders_BTLC = self.clip.leaders(x_BTLC)
        q_BTLC, k_BTLC = self.to_q(leaders_BTLC), projected(self.to_k, leaders_BTLC[:, :last])
        v_BTLC = projected(self.to_v, x_BTLC[:, :last])
        parts = []
        if start:
            q_B1XC = rearrange(q_BTLC[:, :start], "b t l c -> b 1 (t l) c")
            y_B1XC = self._attend(q_B1XC, k_BTLC[:, :1], v_BTLC[:, :1])
            parts.append(rearrange(y_B1XC, "b 1 (t l) c -> b t l c", t=start))
        if start < frames:
            k_BTMC, v_BTMC = (referred(x, start, frames, references) for x in (k_BTLC, v_BTLC))
            parts.append(self._attend(q_BTLC[:, start:], k_BTMC, v_BTMC))
        return self.to_out[1](self.to_out[0](rearrange(torch.cat(parts, dim=1), "b t l c -> (b t) l c")))

    def _attend(self, q_BTLC: Tensor, k_BTMC: Tensor, v_BTMC: Tensor) -> Tensor:
        """Every entry of `T` looks at the keys of the same entry."""
        y_NLC = attend(self, q_BTLC.flatten(0, 1), k_BTMC.flatten(0, 1), v_BTMC.flatten(0, 1))
        return rearrange(y_NLC, "(b t) l c -> b t l c", b=len(v_BTMC))


class TemporalAttention(Attention):
    """Attention along time at every site."""

    clip: Clip
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList

    def forward(self, hidden_states: Tensor, *_, **__) -> Tensor:
        """`S T C` to `S T C`, for S sites of all clips."""
        leaders = self.clip.leaders(hidden_states)
        y_STC = attend(self, self.to_q(leaders), self.to_k(leaders), self.to_v(hidden_states))
        return self.to_out[1](self.to_out[0](y_STC))


class TextAttention(Attention):
    """Cross-attention of an image UNet that takes the text of a clip once instead of once per frame.

    In a led batch every clip asks its prompt what the leader asks its own, so that a new subject appears where the old
    one was (Prompt-to-Prompt, section 3, with queries in place of maps).
    """

    clip: Clip
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """`N L C` to `N L C`; a text `B L D`, of clips instead of images, is one that their frames share."""
        text: Any = encoder_hidden_states
        frames, x_NLC = self.clip.frames, self.clip.followed(self.clip.leaders(hidden_states))
        if isinstance(text, tuple):  # an IP-Adapter adds something for each image
            words, pictures = text
            text = (words.repeat_interleave(len(x_NLC) // len(words), dim=0), pictures)
        if not isinstance(text, Tensor) or len(text) == len(x_NLC):
            return super().forward(x_NLC, text, *args, **kwargs)
        x_BLC = rearrange(x_NLC, "(b t) l c -> b (t l) c", t=frames)
        y_BLC = attend(self, self.to_q(x_BLC), self.to_k(text), self.to_v(text))
        return rearrange(self.to_out[1](self.to_out[0](y_BLC)), "b (t l) c -> (b t) l c", t=frames)


def projected(layer: nn.Module, x_BTLC: Tensor) -> Tensor:
    """A linear layer on all tokens at once: on a slice of a clip torch would copy its weights for every frame."""
    return layer(x_BTLC.flatten(0, 2)).unflatten(0, x_BTLC.shape[:3])


def attend(attn: Attention, q_NLC: Tensor, k_NMC: Tensor, v_NMC: Tensor) -> Tensor:
    """Scaled-dot-product attention with the heads of `attn`: `N L C`.

    In a led batch there are several times as many values as queries and keys: those of every clip, whose maps are one.
    """
    heads, clips = attn.heads, len(v_NMC) // len(q_NLC)
    q_NHLD, k_NHMD, v_NHMD = (rearrange(x, "n l (h d) -> n h l d", h=heads) for x in (q_NLC, k_NMC, v_NMC))
    if tiles.suit(q_NHLD, k_NHMD, clips) and not attn.upcast_attention:
        v_NHMD = rearrange(v_NHMD, "(b n) h m d -> n h m (b d)", b=clips)
        y_NHLD = tiles.attend(q_NHLD, k_NHMD, v_NHMD, attn.scale)
        return rearrange(y_NHLD, "n h l (b d) -> (b n) l (h d)", b=clips)
    led = (x.repeat(clips, 1, 1, 1) if clips > 1 else x for x in (q_NHLD, k_NHMD))
    batches = zip(*(x.split(MAX_BATCH) for x in (*led, v_NHMD)), strict=True)
    parts = [scaled_dot_product_attention(*batch, scale=attn.scale) for batch in batches]
    y_NHLD = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rearrange(y_NHLD, "n h l d -> n l (h d)")


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
