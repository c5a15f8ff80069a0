"""Layers of a video UNet, each a subclass of the image layer it replaces.

Shape letters: B clips, T frames, N = B*T images, L tokens of an image, M keys, C channels, S = B*L tokens of all
clips. All layers share one `ClipLayout`, which says how many frames per clip the batch of images has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import group_norm

from tuneavideo.kernels import attention as kernels
from tuneavideo.kernels import normalisation, supports


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


# The frame that frame t of a clip of so many frames refers to.
REFERENCES: dict[str, Callable[[int, int], int]] = {
    "first": lambda t, frames: 0,
    "previous": lambda t, frames: max(t - 1, 0),
    "own": lambda t, frames: t,
}


@cache
def referred_frames(frames: int, references: tuple[str, ...]) -> list[list[int]]:
    """Return, for each frame of a clip, the numbers of the frames it refers to (Tune-A-Video, eq. 4)."""
    return [[REFERENCES[name](t, frames) for name in references] for t in range(frames)]


@cache
def only_first(frames: int, references: tuple[str, ...]) -> int:
    """Return how many frames at the start of a clip refer to no frame but frame 0."""
    return next((t for t, numbers in enumerate(referred_frames(frames, references)) if any(numbers)), frames)


def referred(x_BTLC: Tensor, start: int, frames: int, references: tuple[str, ...]) -> Tensor:
    """Concatenate, for each frame from `start` on, the tokens of the frames it refers to: `B T-start M C`."""
    columns = zip(*referred_frames(frames, references)[start:], strict=True)
    return torch.cat([_gather(x_BTLC, numbers) for numbers in columns], dim=2)


def _gather(x_BTLC: Tensor, numbers: tuple[int, ...]) -> Tensor:
    """Return these frames of each clip: a view if they are one frame or follow each other."""
    first, count = numbers[0], len(numbers)
    if set(numbers) == {first}:
        return x_BTLC[:, first : first + 1].expand(-1, count, -1, -1)
    if numbers == tuple(range(first, first + count)):
        return x_BTLC[:, first : first + count]
    return torch.stack([x_BTLC[:, number] for number in numbers], dim=1)


class VideoAttention(Attention):
    """Attention in a video UNet.

    It computes for itself instead of through a processor: diffusers replaces processors when slicing, fusing or loading
    IP-Adapters.
    """

    clip: ClipLayout
    to_k: nn.Linear
    to_v: nn.Linear
    to_out: nn.ModuleList

    def _attend(self, q_NLC: Tensor, k_NMC: Tensor, v_NMC: Tensor) -> Tensor:
        return kernels.attend(q_NLC, k_NMC, v_NMC, heads=self.heads, scale=self.scale)

    def _output(self, x: Tensor) -> Tensor:
        return self.to_out[1](self.to_out[0](x))


class SparseCausalAttention(VideoAttention):
    """Self-attention whose keys and values are tokens of the first and the previous frame (Tune-A-Video, eq. 4).

    `ClipLayout.references` may name other frames. Keys and values are projected once per token and then gathered.
    Frames that would refer to frame 0 twice refer to it once, which is the same: the softmax over keys that all occur
    twice has half the weight on each.
    """

    def forward(self, hidden_states: Tensor, *_, **__) -> Tensor:
        """Attend; `N L C` to `N L C`."""
        y_BTLC = self._by_kernel(hidden_states) if supports(hidden_states) else self._by_torch(hidden_states)
        return self._output(rearrange(y_BTLC, "b t l c -> (b t) l c"))

    def _by_torch(self, x_NLC: Tensor) -> Tensor:
        frames, references = self.clip.frames, self.clip.references
        x_BTLC = rearrange(x_NLC, "(b t) l c -> b t l c", t=frames)
        start = only_first(frames, references)
        is_last_used = any(frames - 1 in numbers for numbers in referred_frames(frames, references))
        count = frames if is_last_used else frames - 1  # of frames whose keys and values are needed
        source_BTLC = self.clip.source_part(x_BTLC)
        q_BTLC, k_BTLC = self.to_q(source_BTLC), project(self.to_k, source_BTLC[:, :count])
        v_BTLC = project(self.to_v, x_BTLC[:, :count])
        parts = []
        if start:
            q_BXC = rearrange(q_BTLC[:, :start], "b t l c -> b (t l) c")
            y_BXC = self._attend(q_BXC, k_BTLC[:, 0], v_BTLC[:, 0])
            parts.append(rearrange(y_BXC, "b (t l) c -> b t l c", t=start))
        if start < frames:
            q_NLC = q_BTLC[:, start:].flatten(0, 1)
            k_NMC, v_NMC = (referred(x, start, frames, references).flatten(0, 1) for x in (k_BTLC, v_BTLC))
            parts.append(self._attend(q_NLC, k_NMC, v_NMC).unflatten(0, (-1, frames - start)))
        return torch.cat(parts, dim=1)

    def _by_kernel(self, x_NLC: Tensor) -> Tensor:
        frames, references, source_NLC = self.clip.frames, self.clip.references, self.clip.source_part(x_NLC)
        q_NLC, k_NLC, v_NLC = self.to_q(source_NLC), self.to_k(source_NLC), self.to_v(x_NLC)
        q_BTLC, k_BTLC, v_BTLC = (x.unflatten(0, (-1, frames)) for x in (q_NLC, k_NLC, v_NLC))
        numbers = referred_frames(frames, references)[only_first(frames, references) :]
        return kernels.attend_to_frames(q_BTLC, k_BTLC, v_BTLC, numbers, heads=self.heads, scale=self.scale)


class TemporalAttention(VideoAttention):
    """Attention between the tokens at one place in all frames of a clip."""

    def forward(self, hidden_states: Tensor, *_, **__) -> Tensor:
        """Attend; `S T C` to `S T C`."""
        source_STC = self.clip.source_part(hidden_states)
        return self._output(self._attend(self.to_q(source_STC), self.to_k(source_STC), self.to_v(hidden_states)))

    def attend_in_images(self, x_NLC: Tensor) -> Tensor:
        """Attend; `N L C` to `N L C`, on a GPU without a copy in another order."""
        frames = self.clip.frames
        if not kernels.supports_time(x_NLC, frames):
            y_STC = self(rearrange(x_NLC, "(b t) l c -> (b l) t c", t=frames))
            return rearrange(y_STC, "(b l) t c -> (b t) l c", l=x_NLC.shape[1])
        source_NLC = self.clip.source_part(x_NLC)
        q_NLC, k_NLC, v_NLC = self.to_q(source_NLC), self.to_k(source_NLC), self.to_v(x_NLC)
        y_NLC = kernels.attend_over_time(q_NLC, k_NLC, v_NLC, frames=frames, heads=self.heads, scale=self.scale)
        return self._output(y_NLC)


class TextAttention(VideoAttention):
    """Cross-attention that takes the text of a clip once instead of once per frame.

    With injection every clip attends to its own text with queries of the source, so that a new subject appears where
    the old one was (Prompt-to-Prompt, section 3, with queries in place of maps).
    """

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Attend; `N L C` to `N L C`. A text `B L D`, of clips instead of images, is shared by their frames."""
        text: Any = encoder_hidden_states
        source_NLC = self.clip.source_part(hidden_states)
        x_NLC = self.clip.broadcast(source_NLC)
        if isinstance(text, tuple):  # an IP-Adapter adds something for each image
            words, pictures = text
            text = (words.repeat_interleave(len(x_NLC) // len(words), dim=0), pictures)
        if not isinstance(text, Tensor) or len(text) == len(x_NLC):
            return super().forward(x_NLC, text, *args, **kwargs)
        k_BMC, v_BMC, frames = self.to_k(text), self.to_v(text), self.clip.frames
        if kernels.supports_text(source_NLC, k_BMC, v_BMC, self.heads):
            q_BXC = self.to_q(source_NLC).unflatten(0, (-1, frames)).flatten(1, 2)
            y_BXC = kernels.attend_to_text(q_BXC, k_BMC, v_BMC, heads=self.heads, scale=self.scale)
        else:
            y_BXC = self._attend(self.to_q(rearrange(x_NLC, "(b t) l c -> b (t l) c", t=frames)), k_BMC, v_BMC)
        return rearrange(self._output(y_BXC), "b (t l) c -> (b t) l c", t=frames)


def project(layer: nn.Module, x_BTLC: Tensor) -> Tensor:
    """Apply a linear layer to all tokens at once: for a slice of a clip torch would copy its weights for each frame."""
    return layer(x_BTLC.flatten(0, 2)).unflatten(0, x_BTLC.shape[:3])


class VideoBlock(BasicTransformerBlock):
    """A transformer block of an image UNet, followed by temporal attention."""

    clip: ClipLayout
    norm_temp: nn.LayerNorm
    attn_temp: TemporalAttention

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | None = None, *args: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """`N L C` to `N L C`."""
        inputs = (hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask)
        if self._as_published(*args, **kwargs) and supports(hidden_states):
            return self._by_kernel(*inputs)
        x_NLC = super().forward(*inputs, *args, **kwargs)
        if supports(x_NLC, half_only=True):
            return x_NLC + self.attn_temp.attend_in_images(self.norm_temp(x_NLC))
        x_STC = rearrange(x_NLC, "(b t) l c -> (b l) t c", t=self.clip.frames)
        y_STC = self.attn_temp(self.norm_temp(x_STC))
        return x_NLC + rearrange(y_STC, "(b l) t c -> (b t) l c", l=x_NLC.shape[1])

    def _as_published(self, timestep: Any = None, cross_attention_kwargs: Any = None, *_: Any, **__: Any) -> bool:
        """Return whether the block is norm, attention, norm, attention, norm, feed-forward, and nothing else."""
        return (
            self.norm_type == "layer_norm" and self.pos_embed is None and self._chunk_size is None
            and self.attn2 is not None and not self.only_cross_attention and not cross_attention_kwargs
        )  # fmt: skip

    def _by_kernel(self, x_NLC: Tensor, mask: Tensor | None, text: Any, text_mask: Tensor | None) -> Tensor:
        """Compute the block with each addition and the norm after it in one kernel."""
        x_NLC, normed = normalisation.add_and_normalise(self.norm1, x_NLC)
        x_NLC, normed = normalisation.add_and_normalise(self.norm2, self.attn1(normed, attention_mask=mask), x_NLC)
        text_attention: Any = self.attn2
        y_NLC = text_attention(normed, encoder_hidden_states=text, attention_mask=text_mask)
        x_NLC, normed = normalisation.add_and_normalise(self.norm3, y_NLC, x_NLC)
        x_NLC, normed = normalisation.add_and_normalise(self.norm_temp, self.ff(normed), x_NLC)
        return normalisation.add(self.attn_temp.attend_in_images(normed), x_NLC)


class ClipGroupNorm(nn.GroupNorm):
    """Group normalisation whose statistics span all frames of a clip."""

    clip: ClipLayout

    def forward(self, input: Tensor) -> Tensor:
        """`N C H W` to `N C H W`."""
        if supports(input):
            return normalisation.to_map(normalisation.normalise_groups(self, input), input)
        if self.clip.frames == 1:
            return super().forward(input)
        x_BCTHW = rearrange(input, "(b t) c h w -> b c t h w", t=self.clip.frames)
        y_BCTHW = group_norm(x_BCTHW, self.num_groups, self.weight, self.bias, self.eps)
        return rearrange(y_BCTHW, "b c t h w -> (b t) c h w")
