"""Conditioning of a video UNet: text embeddings and, for some models, pooled embeddings or images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_TENSORS = ("text_BLD", "pooled_BD", "images_BID")


@dataclass(frozen=True)
class Conditions:
    """Conditioning inputs of B clips.

    Attributes:
        text_BLD: Embedding of each prompt: L tokens, D channels.
        pooled_BD: Pooled embedding of each prompt (Stable Diffusion XL).
        images_BID: Embeddings of the I reference images of each clip (IP-Adapter).
        stride: Pixels per latent, for the size conditioning of Stable Diffusion XL.
    """

    text_BLD: Tensor
    pooled_BD: Tensor | None = None
    images_BID: Tensor | None = None
    stride: int = 8

    @classmethod
    def of(cls, text: Conditions | Tensor) -> Conditions:
        """Return conditions as they are, or those of a text embedding `B L D` alone."""
        return cls(text) if isinstance(text, Tensor) else text

    def __len__(self) -> int:
        return len(self.text_BLD)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not None, by name."""
        return {name: value for name in _TENSORS if (value := getattr(self, name)) is not None}

    def to(self, *place: Any) -> Conditions:
        """Return a copy on another device or in another precision; arguments are those of `Tensor.to`."""
        return self._each(lambda x: x.to(*place))

    def expand(self, count: int) -> Conditions:
        """Repeat the conditions of one clip for `count` clips."""
        return self._each(lambda x: x.expand(count, *x.shape[1:]))

    def repeated(self, times: int) -> Conditions:
        """Repeat each clip's conditions `times` times, once per frame."""
        return self._each(lambda x: x.repeat_interleave(times, dim=0))

    def split(self, size: int | list[int]) -> list[Conditions]:
        """Split along the batch, as `Tensor.split` does."""
        parts = len(self.text_BLD.split(size))
        return [self._each(lambda x, number=number: x.split(size)[number]) for number in range(parts)]

    def joined(self, other: Conditions) -> Conditions:
        """Concatenate with `other`, which has the same tensors."""
        theirs = other.tensors()
        return replace(self, **{name: torch.cat([own, theirs[name]]) for name, own in self.tensors().items()})

    def added(self, rows: int, columns: int) -> dict[str, Any] | None:
        """Return diffusers' `added_cond_kwargs` for latents of that height and width, without cropping, or None."""
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
