"""Tuning: trainable parameters, the loss, interruption and resuming."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler

from tests.shared.noise import STABLE
from tests.shared.tuning import tuning
from tuneavideo.errors import RunError, SettingsError
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import trainable_parameters
from tuneavideo.method.noise import NoiseSchedule
from tuneavideo.method.tuning import Tuning
from tuneavideo.settings import PRESETS
from tuneavideo.training.optimizers import make_optimizer


def weights(work: Tuning) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in work.video.unet.state_dict().items()}


def test_tuning_lowers_the_loss_and_touches_only_the_chosen_layers() -> None:
    work = tuning(max_train_steps=60, train_batch_size=4)
    before = weights(work)
    steps = list(work)
    losses, ratios = [step.loss for step in steps], [step.relative_loss or 0 for step in steps]
    after = weights(work)
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    assert sum(ratios[:5]) / 5 > 0.85 > sum(ratios[-20:]) / 20
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(work.parameters)
    assert all(".attn_temp." in name or name.endswith(("attn1.to_q.weight", "attn2.to_q.weight")) for name in moved)


def test_the_official_preset_leaves_the_down_path_as_it_was() -> None:
    chosen = tuning(**PRESETS["official"]).parameters
    every = tuning().parameters
    assert set(every) - set(chosen) == {name for name in every if name.startswith("down_blocks")}


@pytest.mark.parametrize("option", ["trainable_modules", "frozen_modules"])
def test_a_name_that_matches_no_layer_is_an_error(option: str) -> None:
    with pytest.raises(SettingsError, match=rf"{option}: no layer's name .* 'atn1.to_q'"):
        tuning(**{option: ("atn1.to_q",)})


def test_checkpointing_gives_every_tuned_tensor_the_gradient_it_has_without() -> None:
    gradients = {}
    for checkpointing in (False, True):
        work = tuning(gradient_checkpointing=checkpointing, max_grad_norm=1e9)
        list(itertools.islice(work, 2))
        work.loss(*work.draw(0)).backward()
        gradients[checkpointing] = {name: parameter.grad for name, parameter in work.parameters.items()}
    for name, gradient in gradients[False].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, gradients[True][name]), name


VARIANTS = {
    "plain": {},
    "schedule": {"lr_scheduler": "cosine", "lr_warmup_steps": 2},
    "accumulation": {"gradient_accumulation_steps": 2, "train_batch_size": 2},
    "average": {"use_ema": True},
    "adafactor": {"optimizer": "adafactor"},
    "other": {"optimizer": "torch.optim.RMSprop"},
    "weighted": {"snr_gamma": 5.0, "gradient_accumulation_steps": 2, "use_ema": True},
    "references": {"references": ("first", "own")},
    "low rank": {"lora_rank": 2, "use_ema": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_tuning_that_is_broken_off_goes_on_bit_for_bit(variant: str) -> None:
    whole = tuning(**VARIANTS[variant])
    told = [(step.number, step.loss, step.learning_rate) for step in whole]

    broken = tuning(**VARIANTS[variant])
    first = [next(iter(broken)) for _ in range(2)]
    disk = io.BytesIO()
    torch.save(broken.state(), disk)
    disk.seek(0)
    resumed = tuning(**VARIANTS[variant])
    resumed.load_state(torch.load(disk, weights_only=True))
    again = [(step.number, step.loss, step.learning_rate) for step in [*first, *resumed]]

    assert again == told
    for name, value in whole.learned().items():
        assert torch.equal(value, resumed.learned()[name]), name


def test_a_preview_that_is_broken_off_gives_the_weights_back() -> None:
    work = tuning(use_ema=True)
    list(itertools.islice(work, 3))
    before = weights(work)
    with pytest.raises(KeyboardInterrupt), work.averaged():
        assert any(not torch.equal(value, before[name]) for name, value in weights(work).items())
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in weights(work).items())


def test_seeds_decide_and_differ() -> None:
    losses = {seed: [step.loss for step in tuning(seed=seed)] for seed in (1, 2)}
    assert losses[1] == [step.loss for step in tuning(seed=1)]
    assert losses[1] != losses[2]


def test_every_clip_of_a_batch_has_its_own_noise_and_timestep() -> None:
    clean, noise, t = tuning(train_batch_size=3).draw(0)
    assert clean.shape == noise.shape == (3, 4, 3, 8, 8)
    assert len(set(t.tolist())) == 3 and not torch.equal(noise[0], noise[1]) and not torch.equal(clean[0], clean[1])


def test_accumulated_batches_are_averaged() -> None:
    work = tuning(gradient_accumulation_steps=2, optimizer="torch.optim.SGD", max_grad_norm=1e9)
    before = {name: parameter.detach().clone() for name, parameter in work.parameters.items()}
    draws = [work.draw(batch) for batch in range(2)]
    mean = sum(work.loss(*draw) for draw in draws) / 2
    expected = dict(zip(before, torch.autograd.grad(mean, list(work.parameters.values())), strict=True))  # pyright: ignore
    next(iter(work))
    for name, parameter in work.parameters.items():
        wished = before[name] - 1e-2 * (expected[name] + 1e-2 * before[name])
        assert torch.allclose(parameter, wished, atol=1e-6), name


def test_half_precision_keeps_what_learns_in_float32() -> None:
    work = tuning()
    work.video.unet.to(torch.bfloat16)
    again = Tuning(
        work.video, NoiseSchedule.of(DDIMScheduler(**STABLE)), {"mean": work.mean, "std": work.std}, work.text,
        work.settings, Accelerator(cpu=True), make_optimizer,
    )  # fmt: skip
    chosen = trainable_parameters(work.video.unet, work.settings.trainable_modules)
    assert {parameter.dtype for parameter in chosen.values()} == {torch.float32}
    assert work.video.unet.conv_in.weight.dtype == torch.bfloat16
    assert again.number == 0


def test_an_unknown_optimizer_names_those_that_are_known() -> None:
    with pytest.raises(SettingsError, match="'adamm': no such name; take adamw, adamw8bit, adafactor, "):
        tuning(optimizer="adamm")


@pytest.mark.parametrize(
    "name",
    ["sgd", "RMSprop", "torch.optim.SGD", "tuneavideo.interop.optimizer.UncorrectedAdamW",
     "tuneavideo.checkpoints.optimizer.UncorrectedAdamW"],  # the last is in the settings of older runs
)  # fmt: skip
def test_an_optimizer_is_named_shortly_or_by_its_path(name: str) -> None:
    assert type(tuning(optimizer=name).optimizer.optimizer).__name__.lower() == name.rpartition(".")[2].lower()


def test_steps_of_adafactor_have_the_size_of_the_learning_rate() -> None:
    made = tuning(optimizer="adafactor", learning_rate=1e-3)
    before = [parameter.detach().clone() for parameter in made.parameters.values()]
    next(iter(made))
    after = [parameter.detach() for parameter in made.parameters.values()]
    assert max(float((x - y).square().mean().sqrt()) for x, y in zip(after, before, strict=True)) > 3e-4


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("torch.nn.Linear", "is no torch.optim.Optimizer"),
        ("torch.optim.Optimizer.step", "No module named"),
        ("torch.optim", "is no torch.optim.Optimizer"),
        ("math.pi", "'math' is no installed package"),
        ("os.system", "'os' is no installed package"),
        ("lbfgs", "computes the loss several times"),
        ("numpy.pi", "is no torch.optim.Optimizer"),
        ("muon", "cannot be used: "),
        ("...", "no such name"),
        ("", "no such name"),
    ],
)
def test_what_is_no_optimizer_is_refused_in_one_line(name: str, why: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(why)) as error:
        tuning(optimizer=name)
    assert "\n" not in str(error.value) and "adamw8bit" in str(error.value)


def test_no_optimizer_is_imported_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mine", "prodigyopt"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    for name in ("mine.Best", "prodigyopt.Prodigy"):
        with pytest.raises(SettingsError, match="is no installed package"):
            tuning(optimizer=name)
    assert not (tmp_path / "ran").exists()


def test_a_loss_that_is_no_number_stops_the_tuning_before_it_moves_the_weights() -> None:
    work = tuning()
    list(itertools.islice(work, 2))
    before, work.text = weights(work), Conditions(work.text.text_BLD * float("nan"))
    with pytest.raises(RunError, match=r"loss is nan, its gradient nan at step 3; .* lower learning_rate \(now 0.01\)"):
        next(iter(work))
    assert work.number == 2
    assert all(torch.equal(value, before[name]) for name, value in weights(work).items())


def test_a_resumed_tuning_takes_the_learning_rate_of_its_settings() -> None:
    options = {"lr_scheduler": "linear", "max_train_steps": 4}
    whole, first = tuning(**options), tuning(**options, learning_rate=3.0)
    rates = [step.learning_rate for step in whole]
    list(itertools.islice(first, 2))
    again = tuning(**options)
    again.load_state(first.state())
    assert again.optimizer.param_groups[0]["lr"] == rates[1]
    assert [step.learning_rate for step in again] == rates[2:]


# The loss beside that of the untuned model

ENOUGH = {"max_train_steps": 200}
TAKEN = {
    "plain": {},
    "velocity in windows": {"window": 4, "prediction": "v_prediction"},
    "weighted": {"snr_gamma": 5.0, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("variant", TAKEN)
def test_the_relative_loss_of_a_model_that_does_not_learn_is_one_whatever_timesteps_are_drawn(variant: str) -> None:
    work = tuning(frames=6, learning_rate=1e-9, **ENOUGH | TAKEN[variant])
    ratios = [step.relative_loss or 0 for step in itertools.islice(work, 8)]
    assert ratios == pytest.approx([1] * 8, abs=0.25) and sum(ratios) / 8 == pytest.approx(1, abs=0.08)


def test_the_relative_loss_costs_few_predictions_and_changes_no_bit_of_a_tuning() -> None:
    with_it, without = tuning(**ENOUGH), tuning(**ENOUGH)
    calls = []
    with_it.video.unet.register_forward_hook(lambda *_: calls.append(0))
    next(iter(with_it))
    assert 4 <= len(calls) - 1 <= 0.03 * 3 * 200
    without.measure_untuned = lambda: None
    next(iter(without))
    told = [[(step.loss, step.learning_rate) for step in itertools.islice(work, 2)] for work in (with_it, without)]
    assert told[0] == told[1]
    for name, value in with_it.learned().items():
        assert torch.equal(value, without.learned()[name]), name


def test_a_tuning_too_short_to_measure_the_untuned_model_has_no_relative_loss() -> None:
    assert next(iter(tuning())).relative_loss is None


def test_a_resumed_tuning_has_the_relative_losses_of_an_unbroken_one() -> None:
    whole, broken, resumed = (tuning(**ENOUGH, use_ema=True) for _ in range(3))
    told = [step.relative_loss for step in itertools.islice(whole, 3)]
    first = [step.relative_loss for step in itertools.islice(broken, 2)]
    resumed.load_state(broken.state())
    assert [*first, next(iter(resumed)).relative_loss] == told
    old = broken.state()
    del old["untuned"]
    resumed.load_state(old)
    assert next(iter(resumed)).relative_loss is None


def test_a_step_that_the_scaler_skips_moves_neither_schedule_nor_average() -> None:
    """An overflow, as in fp16 at a scale that is too large."""
    accelerator = Accelerator(cpu=True)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=3e38)
    accelerator.scaler = scaler
    work = tuning(prediction="v_prediction", lr_scheduler="linear", use_ema=True, accelerator=accelerator)
    work.mean.mul_(1000)  # for a loss whose scaled value overflows
    before, steps = weights(work), iter(work)
    step = next(steps)
    assert all(torch.equal(value, before[name]) for name, value in weights(work).items())
    assert work.ema and (step.learning_rate, work.ema.optimization_step) == (1e-2, 0)
    scaler.update(1.0)
    assert next(steps).learning_rate < 1e-2 and work.ema.optimization_step == 1
