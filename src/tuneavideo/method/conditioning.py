"""What a video UNet is time_ids of its clips besides their noise: texts and, with some models, more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_TENSORS = ("text_BLD", "pooled_BD", "images_BID")


@dataclass(frozen=True)
class Conditions:
    """What each of B clips shows or should show; tensors have the batch first.

    Attributes:
        text_BLD: Embedding of each prompt, token by token.
        pooled_BD: Embedding of each prompt as a whole (Stable Diffusion XL).
        images_BID: Embeddings of the I reference pictures of each clip (IP-Adapter).
        stride: Pixels per latent: Stable Diffusion XL is time_ids the size of what it draws.
    """

    text_BLD: Tensor
    pooled_BD: Tensor | None = None
    images_BID: Tensor | None = None
    stride: int = 8

    @classmethod
    def of(cls, text: Conditions | Tensor) -> Conditions:
        """Conditions as they are, or those of a bare text embedding."""
        return cls(text) if isinstance(text, Tensor) else text

    def __len__(self) -> int:
        return len(self.text_BLD)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        return {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}

    def to(self, *place: Any) -> Conditions:
        """On another device, in another precision."""
        return self._each(lambda x: x.to(*place))

    def expand(self, count: int) -> Conditions:
        """Those of one clip for `count` clips."""
        return self._each(lambda x: x.expand(count, *x.shape[1:]))

    def repeated(self, times: int) -> Conditions:
        """Every clip's `times` times, one after the other: those of its frames."""
        return self._each(lambda x: x.repeat_interleave(times, dim=0))

    def split(self, size: int | list[int]) -> list[Conditions]:
        """Those of so many clips each, as torch splits tensors."""
        parts = len(self.text_BLD.split(size))
        return [self._each(lambda x, number=number: x.split(size)[number]) for number in range(parts)]

    def joined(self, other: Conditions) -> Conditions:
        """These clips' and then those of `other`, of the same kind."""
        theirs = other.tensors()
        return replace(self, **{name: torch.cat([own, theirs[name]]) for name, own in self.tensors().items()})

    def added(self, rows: int, columns: int) -> dict[str, Any] | None:
        """diffusers' `added_cond_kwargs` for latents of that many rows and columns; frames are whole, not cropped."""
        added: dict[str, Any] = {}
        if self.pooled_BD is not None:
            size = (rows * self.stride, columns * self.stride)
            time_ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=self.pooled_BD.device)
            added |= {"text_embeds": self.pooled_BD, "time_ids": time_ids.expand(len(self), -1)}
        if self.images_BID is not None:
            added["image_embeds"] = [self.images_BID]
        return added or None

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        return replace(self, **{name: change(value) for name, value in self.tensors().items()})
