"""The layers that make an image UNet see a clip.

Shape letters: B clips, T frames, N = B*T images, L tokens of an image, M tokens looked at, H heads, D head channels,
C channels. Each layer is a subclass of the image layer it takes the place of, and shares one `ClipLayout` that says how
many frames the batch of images holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import group_norm, scaled_dot_product_attention

from tuneavideo import kernels
from tuneavideo.kernels import channels_last, tiles

# Fast attention kernels take a batch of at most 65,535; temporal attention has one entry per clip and site.
MAX_BATCH = 32768
# Channels of a head, of all clips together, that the kernel for shared maps holds.
WIDEST = 256


@dataclass
class ClipLayout:
    """How the images of a batch form clips; one object, shared by all layers of a UNet and set by `VideoUNet`.

    An inflated UNet therefore serves one request at a time.

    Attributes:
        frames: Frames per clip.
        references: Frames that self-attention refers to (see `REFERENCES`).
        clips: Clips in the batch.
        inject: Attention injection: every clip takes the queries and keys of the first one, the source, and values of
            its own (Plug-and-Play, section 4).
    """

    frames: int = 1
    references: tuple[str, ...] = ("first", "previous")
    clips: int = 1
    inject: bool = False

    def source_part(self, x: Tensor) -> Tensor:
        """Return the part of a batch that queries and keys are computed from: with injection, the first clip."""
        return x[: len(x) // self.clips] if self.inject else x

    def broadcast(self, x: Tensor) -> Tensor:
        """Repeat what was computed from the source part for the whole batch."""
        return x.repeat(self.clips, *(1,) * (x.ndim - 1)) if self.inject else x


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


@cache
def numbers(start: int, frames: int, references: tuple[str, ...]) -> list[list[int]]:
    """For frames `start`, `start` + 1, ..., the numbers of the frames they refer to."""
    every_1T11 = torch.arange(frames)[None, :, None, None]
    found = [REFERENCES[name](every_1T11, start, frames).flatten().tolist() for name in references]
    return [list(each) for each in zip(*found, strict=True)]


class SparseCausalAttention(Attention):
    """Self-attention of an image UNet that looks at the first and the previous frame (Tune-A-Video, eq. 4).

    Keys and values are projected once per token that is looked at, and then gathered. Frames that would see frame 0
    twice see it once: attention to equal keys is the same. It computes for itself instead of through a processor:
    diffusers replaces processors when slicing, fusing or loading IP-Adapters.
    """

    clip: ClipLayout
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList

    def forward(self, hidden_states: Tensor, *_, **__) -> Tensor:
        """`N L C` to `N L C`."""
        if kernels.suit(hidden_states, "gather"):
            return self._on_gpu(hidden_states)
        frames, references = self.clip.frames, self.clip.references
        x_BTLC = rearrange(hidden_states, "(b t) l c -> b t l c", t=frames)
        start = only_first(frames, references)
        last = frames if "own" in references else max(frames - 1, 1)  # nobody looks at the last frame
        source_BTLC = self.clip.source_part(x_BTLC)
        q_BTLC, k_BTLC = self.to_q(source_BTLC), projected(self.to_k, source_BTLC[:, :last])
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

    def _on_gpu(self, x_NLC: Tensor) -> Tensor:
        """The same, one clip after the other: what lies together is never copied, or cut apart on the way back."""
        frames, references = self.clip.frames, self.clip.references
        start, source_NLC = only_first(frames, references), self.clip.source_part(x_NLC)
        of_k, of_v = self.to_k(source_NLC), self.to_v(x_NLC)
        q_BTLC, k_BTLC, v_BTLC = (x.unflatten(0, (-1, frames)) for x in (self.to_q(source_NLC), of_k, of_v))
        looked = numbers(start, frames, references)
        if self.clip.inject and kernels.suit(x_NLC, "shared") and len(v_BTLC) * v_BTLC.shape[3] <= WIDEST * self.heads:
            asking, asked = q_BTLC[0], k_BTLC[0]
            begun = [self._shared(asking[:start], asked, v_BTLC, [[0]] * start)] if start else []
            rest = [self._shared(asking[start:], asked, v_BTLC, looked)] if looked else []
            y_BTLC = torch.cat([*begun, *rest], dim=1)
            return self.to_out[1](self.to_out[0](y_BTLC.flatten(0, 1)))
        index = kernels.frames_index(x_NLC.device, *chain.from_iterable(looked))
        pointwise, parts = kernels.module("pointwise"), []
        (k_B1LC, k_BXLC), (v_B1LC, v_BXLC) = (pointwise.gathered(x, index) for x in (k_BTLC, v_BTLC))
        apart = [clips_of(x) for x in (q_BTLC, k_B1LC, k_BXLC, v_B1LC, v_BXLC)]
        for number in range(len(v_BTLC)):
            q_TLC, k_1LC, k_XLC, v_1LC, v_XLC = (of[number % len(of)] for of in apart)
            begun_TLC, rest_TLC = q_TLC.split([start, frames - start])
            if start:
                parts.append(attend(self, begun_TLC.flatten(0, 1)[None], k_1LC, v_1LC).unflatten(1, (start, -1))[0])
            if looked:
                k_TMC, v_TMC = (x.unflatten(0, (frames - start, -1)).flatten(1, 2) for x in (k_XLC, v_XLC))
                parts.append(attend(self, rest_TLC, k_TMC, v_TMC))
        return self.to_out[1](self.to_out[0](torch.cat(parts)))

    def _shared(self, q_FLC: Tensor, k_TLC: Tensor, v_BTLC: Tensor, looked: list[list[int]]) -> Tensor:
        """What each clip sees where the leader looks, of frames that look at those that are listed: `B F L C`."""
        index = kernels.frames_index(q_FLC.device, *chain.from_iterable(looked)).view(len(looked), -1)
        shared = kernels.module("shared_map")
        return shared.attend(q_FLC, k_TLC, v_BTLC, index, heads=self.heads, scale=self.scale)

    def _attend(self, q_BTLC: Tensor, k_BTMC: Tensor, v_BTMC: Tensor) -> Tensor:
        """Every entry of `T` looks at the keys of the same entry."""
        y_NLC = attend(self, q_BTLC.flatten(0, 1), k_BTMC.flatten(0, 1), v_BTMC.flatten(0, 1))
        return rearrange(y_NLC, "(b t) l c -> b t l c", b=len(v_BTMC))


class TemporalAttention(Attention):
    """Attention along time at every site."""

    clip: ClipLayout
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList

    def forward(self, hidden_states: Tensor, *_, **__) -> Tensor:
        """`S T C` to `S T C`, for S sites of all clips."""
        source = self.clip.source_part(hidden_states)
        y_STC = attend(self, self.to_q(source), self.to_k(source), self.to_v(hidden_states))
        return self.to_out[1](self.to_out[0](y_STC))

    def of_images(self, x_NLC: Tensor) -> Tensor:
        """The same of images, `N L C` to `N L C`, on GPUs without moving them to another order."""
        frames = self.clip.frames
        if kernels.suit(x_NLC, "time") and frames <= kernels.MOST_FRAMES:
            source = self.clip.source_part(x_NLC)
            q, k, v = self.to_q(source), self.to_k(source), self.to_v(x_NLC)
            along = kernels.module("along_time")
            y_NLC = along.attend(q, k, v, frames=frames, heads=self.heads, scale=self.scale)
            return self.to_out[1](self.to_out[0](y_NLC))
        y_STC = self(rearrange(x_NLC, "(b t) l c -> (b l) t c", t=frames))
        return rearrange(y_STC, "(b l) t c -> (b t) l c", l=x_NLC.shape[1])


class TextAttention(Attention):
    """Cross-attention of an image UNet that takes the text of a clip once instead of once per frame.

    In a led batch every clip asks its prompt what the leader asks its own, so that a new subject appears where the old
    one was (Prompt-to-Prompt, section 3, with queries in place of maps).
    """

    clip: ClipLayout
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """`N L C` to `N L C`; a text `B L D`, of clips instead of images, is one that their frames share."""
        text: Any = encoder_hidden_states
        frames, source_NLC = self.clip.frames, self.clip.source_part(hidden_states)
        x_NLC = self.clip.broadcast(source_NLC)
        if isinstance(text, tuple):  # an IP-Adapter adds something for each image
            words, pictures = text
            text = (words.repeat_interleave(len(x_NLC) // len(words), dim=0), pictures)
        if not isinstance(text, Tensor) or len(text) == len(x_NLC):
            return super().forward(x_NLC, text, *args, **kwargs)
        if self._of_few(source_NLC, text):
            k_BMC, v_BMC = self.to_k(text), self.to_v(text)
            if not (k_BMC.requires_grad or v_BMC.requires_grad):
                q_BLC = self.to_q(source_NLC).unflatten(0, (-1, frames)).flatten(1, 2)
                few = kernels.module("few_keys")
                y_BLC = few.attend(q_BLC, k_BMC, v_BMC, heads=self.heads, scale=self.scale)
                return self.to_out[1](self.to_out[0](y_BLC.unflatten(1, (frames, -1)).flatten(0, 1)))
        x_BLC = rearrange(x_NLC, "(b t) l c -> b (t l) c", t=frames)
        y_BLC = attend(self, self.to_q(x_BLC), self.to_k(text), self.to_v(text))
        return rearrange(self.to_out[1](self.to_out[0](y_BLC)), "b (t l) c -> (b t) l c", t=frames)

    def _of_few(self, x_NLC: Tensor, text_BMD: Tensor) -> bool:
        """Whether words and channels are few enough for the kernel that takes them whole."""
        few = text_BMD.shape[1] <= kernels.FEW and self.inner_dim <= kernels.FEW * self.heads
        return few and kernels.suit(x_NLC, "text")


def clips_of(x_BTLC: Tensor) -> Sequence[Tensor]:
    """Each clip; one alone as it lies."""
    return [x_BTLC.squeeze(0)] if len(x_BTLC) == 1 else x_BTLC.unbind()


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
    q_NHLD, k_NHMD = (x.repeat(clips, 1, 1, 1) if clips > 1 else x for x in (q_NHLD, k_NHMD))
    if v_NHMD.is_cuda and len(v_NHMD) <= MAX_BATCH:  # there a split, even in one, would cost copies of gradients
        y_NHLD = scaled_dot_product_attention(q_NHLD, k_NHMD, v_NHMD, scale=attn.scale)
    else:
        batches = zip(*(x.split(MAX_BATCH) for x in (q_NHLD, k_NHMD, v_NHMD)), strict=True)
        parts = [scaled_dot_product_attention(*batch, scale=attn.scale) for batch in batches]
        y_NHLD = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rearrange(y_NHLD, "n h l d -> n l (h d)")


class VideoBlock(BasicTransformerBlock):
    """A transformer block of an image UNet, followed by attention along time at every site."""

    clip: ClipLayout
    norm_temp: nn.LayerNorm
    attn_temp: TemporalAttention

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """`N L C` to `N L C`."""
        if self._as_published(*args, **kwargs) and kernels.suit(hidden_states, "block"):
            return self._joined(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask)
        whole = (hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, *args)
        x_NLC = super().forward(*whole, **kwargs)
        if kernels.suit(x_NLC, "time"):
            return x_NLC + self.attn_temp.of_images(self.norm_temp(x_NLC))
        x_STC = rearrange(x_NLC, "(b t) l c -> (b l) t c", t=self.clip.frames)
        y_STC = self.attn_temp(self.norm_temp(x_STC))
        return x_NLC + rearrange(y_STC, "(b l) t c -> (b t) l c", l=x_NLC.shape[1])

    def _as_published(self, timestep: Any = None, cross_attention_kwargs: Any = None, *_: Any, **__: Any) -> bool:
        """Whether the block is norm, attention, norm, attention, norm, feed-forward, and nothing else."""
        return (
            self.norm_type == "layer_norm" and self.pos_embed is None and self._chunk_size is None
            and self.attn2 is not None and not self.only_cross_attention and not cross_attention_kwargs
        )  # fmt: skip

    def _joined(self, x_NLC: Tensor, mask: Tensor | None, text: Any, text_mask: Tensor | None) -> Tensor:
        """The same, with what is added and the norm after it in one pass."""
        x_NLC, normed = _added_and_normed(self.norm1, x_NLC)
        x_NLC, normed = _added_and_normed(self.norm2, self.attn1(normed, attention_mask=mask), x_NLC)
        text_attention: Any = self.attn2
        y_NLC = text_attention(normed, encoder_hidden_states=text, attention_mask=text_mask)
        x_NLC, normed = _added_and_normed(self.norm3, y_NLC, x_NLC)
        x_NLC, normed = _added_and_normed(self.norm_temp, self.ff(normed), x_NLC)
        return kernels.module("pointwise").added(self.attn_temp.of_images(normed), x_NLC)


def _added_and_normed(norm: Any, x: Tensor, more: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`x + more` and its layer norm."""
    learns = norm.weight is not None and norm.weight.requires_grad and torch.is_grad_enabled()
    if type(norm) is not nn.LayerNorm or learns or len(norm.normalized_shape) != 1:
        total = x if more is None else x + more
        return total, norm(total)
    return kernels.module("pointwise").layer_norm(x, more, norm.weight, norm.bias, norm.eps)


class ClipGroupNorm(nn.GroupNorm):
    """Group normalisation whose statistics span all frames of a clip."""

    clip: ClipLayout

    def forward(self, input: Tensor) -> Tensor:
        """`N C H W` to `N C H W`."""
        if kernels.suit(input, "norm"):
            return channels_last.maps(channels_last.normalised(self, input), input)
        if self.clip.frames == 1:
            return super().forward(input)
        x_BCTHW = rearrange(input, "(b t) c h w -> b c t h w", t=self.clip.frames)
        y_BCTHW = group_norm(x_BCTHW, self.num_groups, self.weight, self.bias, self.eps)
        return rearrange(y_BCTHW, "b c t h w -> (b t) c h w")
