"""Temporal consistency: predictions are averaged along the motion of the source clip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from tests.shared.noise import STABLE
from tuneavideo.method.consistency import RADIUS, Consistency
from tuneavideo.method.noise import NoiseSchedule, split, target
from tuneavideo.video.flow import neighbour_flows, neighbours

FRAMES, SIDE = 5, 12


def still(clean: torch.Tensor, strength: float = 1.0) -> Consistency:
    """Correspondences of a clip at rest."""
    frames, height, width = clean.shape[2:]
    flows = [torch.zeros(len(neighbours(t, frames, RADIUS)), height, width, 2) for t in range(frames)]
    return Consistency(clean, flows, strength)


def moving(clean: torch.Tensor) -> Consistency:
    """Correspondences of a clip that moves right by a site a frame."""
    frames, height, width = clean.shape[2:]
    flows = [
        np.stack([np.broadcast_to((other - t, 0), (height, width, 2)) for other in neighbours(t, frames, RADIUS)])
        for t in range(frames)
    ]
    return Consistency(clean, [torch.from_numpy(flow) for flow in flows], 1.0)


def panned(picture_CHW: torch.Tensor) -> torch.Tensor:
    """A clip `1 C T H W` of a picture that moves right by a site a frame."""
    return torch.stack([picture_CHW.roll(t, dims=-1) for t in range(FRAMES)], dim=1)[None]


def test_the_same_picture_in_every_frame_is_unchanged() -> None:
    picture = torch.randn(1, 4, 1, SIDE, SIDE).expand(-1, -1, FRAMES, -1, -1)
    assert torch.allclose(still(picture).average(picture), picture, atol=1e-5)


def test_small_differences_at_rest_are_averaged_away() -> None:
    clean = torch.randn(1, 4, 1, SIDE, SIDE).expand(-1, -1, FRAMES, -1, -1)
    predicted = clean + 0.1 * torch.randn(2, 4, FRAMES, SIDE, SIDE)
    averaged = still(clean).average(predicted)
    assert averaged.var(dim=2).mean() < 0.01 * predicted.var(dim=2).mean()
    assert torch.allclose(averaged.mean(dim=2), predicted.mean(dim=2), atol=0.02)


def test_half_the_strength_goes_half_the_way() -> None:
    clean, predicted = torch.zeros(1, 4, FRAMES, SIDE, SIDE), torch.randn(1, 4, FRAMES, SIDE, SIDE)
    whole, half = (still(clean, strength).average(predicted) for strength in (1.0, 0.5))
    assert torch.allclose(half, (predicted + whole) / 2, atol=1e-6)


def test_averages_follow_the_motion_of_the_clip() -> None:
    clean, edit = (panned(torch.randn(4, SIDE, SIDE)) for _ in range(2))
    noisy = edit + 0.1 * torch.randn(1, 4, FRAMES, SIDE, SIDE)
    inner = (..., slice(None), slice(None), slice(FRAMES, -FRAMES))
    averaged = moving(clean).average(noisy)
    assert (averaged - edit)[inner].abs().mean() < 0.6 * (noisy - edit)[inner].abs().mean()
    assert (still(clean).average(noisy) - noisy).abs().mean() < 1e-2  # nothing corresponds there at rest


def test_what_appears_in_one_frame_of_the_clip_stays_there() -> None:
    clean, predicted = torch.zeros(1, 4, FRAMES, SIDE, SIDE), torch.randn(1, 4, FRAMES, SIDE, SIDE) / 10
    clean[:, :, 2] += 10
    averaged = still(clean).average(predicted)
    assert torch.equal(averaged[:, :, 2], predicted[:, :, 2])


def test_edits_that_disagree_are_not_mixed() -> None:
    clean = torch.zeros(1, 4, 2, SIDE, SIDE)
    predicted = torch.stack([torch.full((1, 4, SIDE, SIDE), value) for value in (-3.0, 3.0)], dim=2)
    assert torch.allclose(still(clean).average(predicted), predicted, atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_corrected_output_implies_the_averaged_clean_latents(kind: str) -> None:
    schedule = NoiseSchedule.of(DDIMScheduler(**STABLE, prediction_type=kind))
    clean = torch.randn(1, 4, 1, SIDE, SIDE).expand(-1, -1, FRAMES, -1, -1)
    predicted, noise = clean + 0.1 * torch.randn(1, 4, FRAMES, SIDE, SIDE), torch.randn(1, 4, FRAMES, SIDE, SIDE)
    alpha, consistency = schedule.alphas[400], still(clean)
    x = alpha.sqrt() * predicted + (1 - alpha).sqrt() * noise
    output = consistency.corrected(target(predicted, noise, alpha, kind), x, torch.tensor(400), schedule)
    found, rest = split(x, output, alpha, kind)
    assert torch.allclose(found, consistency.average(predicted), atol=1e-4)
    assert torch.allclose(alpha.sqrt() * found + (1 - alpha).sqrt() * rest, x, atol=1e-4)


def test_flow_finds_a_picture_that_moves() -> None:
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 255, (32, 32, 3), np.uint8), np.ones((4, 4, 1), np.uint8))
    images = [np.roll(picture, 4 * t, axis=1) for t in range(3)]
    flows = neighbour_flows(images, 16, 16, 1)
    assert [len(each) for each in flows] == [1, 2, 1]
    assert np.allclose(np.median(flows[0][0], axis=(0, 1)), (0.5, 0), atol=0.1)  # a site has 8 pixels
    assert np.allclose(np.median(flows[1][0], axis=(0, 1)), (-0.5, 0), atol=0.1)
