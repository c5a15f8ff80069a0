"""Temporal consistency of edits: predicted clean latents are averaged over frames along the motion of the source clip.

Sites of two frames correspond where optical flow of the source leads from one to the other and its latents are alike
there. A prediction is averaged with those of corresponding sites that do not differ much from it (a bilateral filter
along motion, as non-local means are along similarity).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, max_pool2d

from tuneavideo.method.noise import NoiseSchedule, split, target
from tuneavideo.video.flow import neighbours

RADIUS = 8
"""Largest distance of two frames that are averaged."""
SOURCE_SCALE = 0.5
"""Squared difference of the source's latents at which a weight falls to 1/e."""
EDIT_SCALE = 2.0
"""The same of the edit's predictions."""


@dataclass(frozen=True)
class Consistency:
    """The correspondences of a clip, and how strongly they are enforced.

    Attributes:
        clean: Latents of the clip, `1 C T H W`.
        flows: For every frame, flow to its neighbours within `RADIUS` frames: `K H W 2`, x and y in sites, on the
            device of `clean`.
        strength: Fraction of the average in the result, 0..1.
    """

    clean: Tensor
    flows: Sequence[Tensor]
    strength: float

    def corrected(self, output: Tensor, x: Tensor, t: Tensor, noise_schedule: NoiseSchedule) -> Tensor:
        """Return a model's output whose clean latents are consistent.

        Args:
            output: Prediction of noise or velocity, `B C T H W`.
            x: Input of the model at timestep `t`.
            t: Timestep.
            noise_schedule: Schedule of the base model.
        """
        alpha, kind = noise_schedule.alphas[round(float(t))].to(x), noise_schedule.prediction_type
        clean = self.average(split(x, output, alpha, kind)[0])
        return target(clean, (x - alpha.sqrt() * clean) / (1 - alpha).sqrt(), alpha, kind)

    def average(self, predicted_BCTHW: Tensor) -> Tensor:
        """Average predicted clean latents `B C T H W` along the motion of the clip."""
        frames = predicted_BCTHW.shape[2]
        averages = [self._average_frame(predicted_BCTHW, t) for t in range(frames)]
        return predicted_BCTHW.lerp(torch.stack(averages, dim=2), self.strength)

    def _average_frame(self, predicted_BCTHW: Tensor, t: int) -> Tensor:
        others = neighbours(t, predicted_BCTHW.shape[2], RADIUS)
        own_BCHW = predicted_BCTHW[:, :, t]
        if not others:
            return own_BCHW
        flow = self.flows[t].to(own_BCHW.dtype)
        source_1KHW = _distance(_warped(self.clean[:, :, others], flow), self.clean[:, :, t])
        alike_1KHW = (max_pool2d(source_1KHW, 3, 1, 1) / -SOURCE_SCALE).exp()
        moved_BCKHW = _warped(predicted_BCTHW[:, :, others], flow)
        edit_BKHW = avg_pool2d(_distance(moved_BCKHW, own_BCHW), 3, 1, 1, count_include_pad=False)
        weights_B1KHW = (alike_1KHW * (edit_BKHW / -EDIT_SCALE).exp())[:, None]
        return (own_BCHW + (weights_B1KHW * moved_BCKHW).sum(2)) / (1 + weights_B1KHW.sum(2))


def _warped(x_BCKHW: Tensor, flow_KHW2: Tensor) -> Tensor:
    """Sample frames at the flow's target of every site (bilinear, `B C K H W`)."""
    batch, _, _, height, width = x_BCKHW.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at_KHW2 = flow_KHW2 + torch.stack([columns, rows], dim=-1).to(flow_KHW2) + 0.5
    grid_KHW2 = at_KHW2 / at_KHW2.new_tensor([width, height]) * 2 - 1
    frames_NCHW = x_BCKHW.transpose(1, 2).flatten(0, 1)
    moved = grid_sample(frames_NCHW, grid_KHW2.repeat(batch, 1, 1, 1), padding_mode="border", align_corners=False)
    return moved.unflatten(0, (batch, -1)).transpose(1, 2)


def _distance(x_BCKHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """Return mean squared differences over channels, `B K H W`."""
    return (x_BCKHW - y_BCHW[:, :, None]).square().mean(1)
