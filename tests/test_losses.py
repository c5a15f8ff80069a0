"""What is true of the variants of the loss, of low-rank tuning and of stopping early."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import image_unet
from tests.test_noise import STABLE
from tests.test_tuning import tuning
from tuneavideo.errors import SettingsError
from tuneavideo.method import losses
from tuneavideo.method.attention import referred
from tuneavideo.method.lora import LowRank
from tuneavideo.method.noise import Levels
from tuneavideo.method.prior import Prior
from tuneavideo.models.adapter import Adapter
from tuneavideo.settings import Inflation

SEEDS = st.integers(0, 2**32)


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


@given(SEEDS, st.integers(0, 6), st.integers(0, 40))
def test_stratified_draws_cover_all_strata_in_every_block(seed: int, power: int, block: int) -> None:
    size = 2**power
    t = losses.stratified(1024, range(block * size, (block + 1) * size), seed)
    assert sorted((t * size // 1024).tolist()) == list(range(size))


@given(SEEDS, st.integers(0, 1000), st.integers(20, 80))
def test_stratified_draws_are_even_in_any_stretch(seed: int, first: int, length: int) -> None:
    t = losses.stratified(1000, range(first, first + length), seed)
    for tenth, count in Counter((t // 100).tolist()).items():
        assert abs(count - length / 10) <= 3, tenth


@given(SEEDS, st.integers(0, 1000))
def test_antithetic_draws_mirror_each_other(seed: int, pair: int) -> None:
    t, mirror = losses.antithetic(1000, [2 * pair, 2 * pair + 1], seed).tolist()
    assert 0 <= t < 1000 and t + mirror == 999


def test_antithetic_draws_are_spread_like_uniform_ones() -> None:
    t = losses.antithetic(10, range(20000), 3)
    counts = torch.bincount(t, minlength=10)
    assert (counts - 2000).abs().max() < 5 * 2 * 2000**0.5


def timesteps(**options) -> list[int]:
    work = tuning(**options)
    drawn = []
    for work.number in range(8):
        for batch in range(work.settings.gradient_accumulation_steps):
            drawn += work.draw(batch)[2].tolist()
    return drawn


@pytest.mark.parametrize("way", ["stratified", "antithetic"])
def test_batches_take_their_timesteps_from_the_one_sequence(way: str) -> None:
    one_by_one = timesteps(timestep_sampling=way, train_batch_size=1, gradient_accumulation_steps=4)
    assert timesteps(timestep_sampling=way, train_batch_size=4) == one_by_one
    assert timesteps(timestep_sampling=way, train_batch_size=2, gradient_accumulation_steps=2) == one_by_one
    assert len(set(one_by_one)) > 20


def test_another_way_of_choosing_timesteps_leaves_the_noise_as_it_was() -> None:
    plain, other = tuning().draw(0), tuning(timestep_sampling="stratified").draw(0)
    assert torch.equal(plain[0], other[0]) and torch.equal(plain[1], other[1])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_shared_noise_has_unit_variance_and_the_wished_covariance(share: float) -> None:
    work = tuning(noise_shared=share, train_batch_size=400)
    _, noise, _ = work.draw(0)
    frames = noise.transpose(1, 2).transpose(0, 1).flatten(1)
    wished = share * torch.ones(3, 3) + (1 - share) * torch.eye(3)
    torch.testing.assert_close(torch.cov(frames), wished, atol=0.02, rtol=0)


def test_the_debiased_loss_hardly_sees_what_all_frames_share() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(2, 4, 6, 8, 8, generator=generator)
    look = torch.randn(2, 4, 1, 8, 8, generator=generator)  # the same in all frames
    motion = torch.randn(2, 4, 6, 8, 8, generator=generator)
    anchor = torch.tensor([1, 4])

    def both(error: torch.Tensor) -> tuple[float, float]:
        plain = losses.squared_error(wanted + error, wanted)
        moved = losses.debiased(wanted + error, anchor), losses.debiased(wanted, anchor)
        return float(plain), float(losses.squared_error(*moved))

    plain, debiased = both(look.expand_as(wanted))
    assert debiased == pytest.approx((2**0.5 - 1) ** 2 * plain, rel=1e-4)  # 0.17 of it
    plain, debiased = both(motion)
    assert debiased == pytest.approx((5 * 3 + (2**0.5 - 1) ** 2) / 6 * plain, rel=0.1)  # 2.5 times


def test_the_debiased_loss_is_added_with_its_weight() -> None:
    plain, work = tuning(), tuning(debias_weight=0.5)
    draw = plain.draw(0)
    clean, noise, t_B = draw
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    anchor_B = torch.randint(3, (1,), generator=generators[0])
    noisy = plain.alphas[t_B].sqrt() * clean + (1 - plain.alphas[t_B]).sqrt() * noise
    prediction = plain.video(noisy, t_B, plain.text)
    extra = (losses.debiased(prediction, anchor_B) - losses.debiased(noise, anchor_B)).square().mean()
    torch.testing.assert_close(work.loss(*draw, generators[1]), plain.loss(*draw) + 0.5 * extra)


@pytest.mark.parametrize("start", ["zero", "official"])
def test_the_prior_is_what_the_image_model_predicts(start: str) -> None:
    work = tuning(prior_weight=1.0, temporal_init=start)
    list(itertools.islice(work, 2))
    before = {name: value.clone() for name, value in work.video.unet.state_dict().items()}
    frame, t, text = torch.randn(2, 4, 1, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 24)
    with torch.no_grad():
        with work.prior.untuned():  # pyright: ignore[reportOptionalMemberAccess]
            ours = work.video(frame, t, text)
        wished = image_unet()(frame[:, :, 0], t, text).sample
        assert not torch.allclose(work.video(frame, t, text)[:, :, 0], wished, atol=1e-4)
    torch.testing.assert_close(ours[:, :, 0], wished, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in work.video.unet.state_dict().items())


def test_the_prior_keeps_the_image_model() -> None:
    prior = tuning(prior_weight=1.0).prior
    assert prior
    empty = prior.empty

    def strayed(weight: float) -> float:
        work = tuning(max_train_steps=10, train_batch_size=2, prior_weight=weight)
        list(work)
        frame, t = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.full((8,), 500)
        text = empty.expand(8).text_BLD
        with torch.no_grad():
            tuned = work.video(frame[:, :, None], t, text)[:, :, 0]
            return float((tuned - image_unet()(frame, t, text).sample).square().mean())

    assert strayed(10.0) < 0.5 * strayed(0.0)


def test_checkpointing_gives_the_prior_the_gradient_it_has_without() -> None:
    gradients = {}
    for checkpointing in (False, True):
        work = tuning(gradient_checkpointing=checkpointing, prior_weight=1.0, temporal_init="official")
        list(itertools.islice(work, 2))
        work.learn(0)
        gradients[checkpointing] = {name: parameter.grad for name, parameter in work.parameters.items()}
    for name, gradient in gradients[False].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[True][name]), name


def test_a_prior_without_an_empty_prompt_is_refused() -> None:
    work = tuning()
    levels = Levels.of(DDIMScheduler(**STABLE))
    with pytest.raises(SettingsError, match="prior_weight: the embedding of the empty prompt is missing"):
        Prior.of(work.video, work.parameters, levels, None, torch.device("cpu"))


def test_low_rank_tuning_changes_matrices_by_that_rank() -> None:
    work = tuning(lora_rank=2, max_train_steps=10)
    before = {name: parameter.detach().clone() for name, parameter in work.parameters.items()}
    list(work)
    for name, value in work.learned().items():
        change = value - before[name]
        assert change.abs().max() > 0, name
        if change.ndim > 1:
            sizes = torch.linalg.svdvals(change.double())
            assert sizes[1] > 1e-3 * sizes[0] and sizes[2] < 1e-4 * sizes[0], name
    assert sum(p.numel() for p in work.optimised.values()) < 0.5 * sum(p.numel() for p in work.parameters.values())


def test_low_rank_gradients_are_those_of_autograd() -> None:
    layer = nn.Linear(6, 5)
    low_rank = LowRank(dict(layer.named_parameters()), 2, seed=0)
    up, down = low_rank.factors["weight.up"], low_rank.factors["weight.down"]
    nn.init.normal_(up)
    low_rank.merge()
    x = torch.randn(7, 6)
    wished = torch.autograd.grad(linear(x, low_rank.first["weight"] + up @ down, layer.bias).square().sum(), [up, down])
    layer(x).square().sum().backward()
    low_rank.take_gradients()
    torch.testing.assert_close((up.grad, down.grad), wished)
    assert layer.weight.grad is None and layer.bias.grad is not None


def test_an_adapter_of_low_rank_tuning_is_like_any_other() -> None:
    work, plain = tuning(lora_rank=2), tuning()
    list(work)
    kept = Adapter.of(work.video.unet, work.learned(), inflation=Inflation(), base="-", fingerprint={})
    assert {name: value.shape for name, value in kept.tensors.items()} == {
        name: value.shape for name, value in work.parameters.items()
    } | {name: value.shape for name, value in kept.tensors.items() if ".norm_temp." in name}
    assert set(work.learned()) == set(plain.learned())
    frame, t, text = torch.randn(1, 4, 3, 8, 8), torch.tensor(300), torch.randn(1, 5, 24)
    with torch.no_grad():
        attached = kept.attach(image_unet()).video
        assert torch.equal(attached(frame, t, text), work.video(frame, t, text))


def test_settled_asks_for_an_improvement_by_the_share() -> None:
    assert not losses.settled([], 0.1, 2)
    assert not losses.settled([1.0, 0.95], 0.1, 2)  # nothing before the last two
    assert losses.settled([1.0, 0.95, 0.91], 0.1, 2)
    assert not losses.settled([1.0, 0.95, 0.89], 0.1, 2)
    assert not losses.settled([1.0, 0.5, 0.45, 0.4], 0.1, 2)
    assert losses.settled([1.0, 0.5, 0.6, 0.7], 0.1, 2)


def test_tuning_stops_when_measurements_stop_falling() -> None:
    work = tuning(max_train_steps=20, early_stopping=0.05, early_stopping_steps=2, learning_rate=1e-6)
    assert [step.number for step in work] == list(range(1, 7))
    assert len(work.measured) == 3


def test_measuring_changes_nothing() -> None:
    plain = tuning(max_train_steps=6)
    measured = tuning(max_train_steps=6, early_stopping=0.0, early_stopping_steps=1, early_stopping_patience=9)
    assert [step.loss for step in plain] == [step.loss for step in measured]
    assert len(measured.measured) == 6
    assert measured.measure() == measured.measured[-1]
    assert all(torch.equal(value, measured.learned()[name]) for name, value in plain.learned().items())


def test_the_first_and_middle_frame_are_seen_by_all() -> None:
    x_BTLC = torch.arange(5.0).view(1, 5, 1, 1)
    seen = referred(x_BTLC, 0, 5, ("first", "middle", "previous", "own")).flatten(0, 1)
    assert seen[:, :, 0].tolist() == [[0, 2, max(t - 1, 0), t] for t in range(5)]


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
