"""Tests of the loss and its weights, and of frozen layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.shared.tuning import tuning
from tuneavideo.method import losses


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weighs_levels_by_the_formula(gamma: float) -> None:
    alpha = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    snr = alpha / (1 - alpha)
    least = snr.clamp(max=gamma)
    torch.testing.assert_close(losses.min_snr(alpha, gamma, "epsilon"), least / snr)
    torch.testing.assert_close(losses.min_snr(alpha, gamma, "v_prediction"), least / (snr + 1))


def test_min_snr_has_its_limits_where_all_is_noise_or_none_is() -> None:
    ends = torch.tensor([0.0, 1.0])
    assert losses.min_snr(ends, 5.0, "epsilon").tolist() == [1.0, 0.0]
    assert losses.min_snr(ends, 5.0, "v_prediction").tolist() == [0.0, 0.0]


def test_min_snr_weighs_each_clip_of_a_batch_for_itself() -> None:
    plain, weighted = tuning(train_batch_size=2), tuning(train_batch_size=2, snr_gamma=2.0)
    clean, noise, _ = plain.draw(0)
    t_B = torch.tensor([20, 900])
    alone = [plain.loss(clean[i, None], noise[i, None], t_B[i, None]) for i in range(2)]
    weights = losses.min_snr(plain.alphas[t_B], 2.0, "epsilon")
    assert weights[0] < 0.1 and weights[1] == 1
    wished = (weights[0] * alone[0] + weights[1] * alone[1]) / 2
    torch.testing.assert_close(weighted.loss(clean, noise, t_B), wished)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_down_path_has_no_graph_and_costs_nothing_backwards(checkpointing: bool) -> None:
    def backwards(*, cut: bool = False, **options) -> int:
        work = tuning(gradient_checkpointing=checkpointing, **options)
        for block in work.video.unet.down_blocks:
            block.forward = torch.no_grad()(block.forward) if cut else block.forward
            if options:
                block.register_forward_hook(_has_no_graph)
        with sdpa_kernel(SDPBackend.MATH):  # the form of attention that is counted
            loss = work.loss(*work.draw(0))
            with FlopCounterMode(display=False) as counter:
                loss.backward()
        return counter.get_total_flops()

    frozen = backwards(frozen_modules=("down_blocks",))
    assert 0 < frozen == backwards(frozen_modules=("down_blocks",), cut=True) < 0.9 * backwards()


def _has_no_graph(_layer: nn.Module, _inputs: tuple, outputs: tuple) -> None:
    hidden, residuals = outputs
    assert not any(x.requires_grad for x in (hidden, *residuals))
