"""Prior preservation: what the image model knows of single pictures is not to be lost while it learns motion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tuneavideo.errors import SettingsError
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import VideoUNet
from tuneavideo.method.losses import squared_error
from tuneavideo.method.noise import Levels, add_noise


@dataclass(frozen=True)
class Prior:
    """The image model that is being tuned, as it was before.

    Attributes:
        video: The inflated UNet.
        tuned: Its tuned parameters, by name.
        image: Their values in the image model; nothing comes out of attention along time.
        alphas: Level of every timestep.
        empty: Conditions of the empty prompt.
    """

    video: VideoUNet
    tuned: Mapping[str, nn.Parameter]
    image: Mapping[str, Tensor]
    alphas: Tensor
    empty: Conditions

    @classmethod
    def of(
        cls,
        video: VideoUNet,
        tuned: Mapping[str, nn.Parameter],
        levels: Levels,
        empty: Conditions | Tensor | None,
        device: torch.device,
    ) -> Prior:
        """Remember the weights at hand. Raises SettingsError without an `empty` prompt."""
        if empty is None:
            raise SettingsError("prior_weight: the embedding of the empty prompt is missing; give it, or weight 0")
        silent = ".attn_temp.to_out."  # the official start is not
        image = {n: torch.zeros_like(p) if silent in n else p.detach().clone() for n, p in tuned.items()}
        return cls(video, tuned, image, levels.alphas.to(device), Conditions.of(empty).to(device))

    def loss(self, clean_BCTHW: Tensor, generator: torch.Generator) -> Tensor:
        """Mean squared distance to the image model's predictions for a noisy frame of each clip, without a prompt."""
        device, (count, _, frames, *_) = clean_BCTHW.device, clean_BCTHW.shape
        frame_B, t_B = (torch.randint(n, (count,), generator=generator).to(device) for n in (frames, len(self.alphas)))
        still_BC1HW = clean_BCTHW[torch.arange(count), :, frame_B, None]
        noise = torch.randn(still_BC1HW.shape, generator=generator).to(device)
        noisy, text = add_noise(still_BC1HW, noise, self.alphas[t_B]), self.empty.expand(count)
        with torch.no_grad(), self.untuned():
            wanted = self.video(noisy, t_B, text).float()
        return squared_error(self.video(noisy, t_B, text).float(), wanted)

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """Within it the UNet predicts for a clip of one frame what the image model predicts."""
        at_hand = {name: parameter.data for name, parameter in self.tuned.items()}
        try:
            for name, parameter in self.tuned.items():
                parameter.data = self.image[name]
            yield
        finally:
            for name, parameter in self.tuned.items():
                parameter.data = at_hand[name]
