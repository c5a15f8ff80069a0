"""The benchmark's operation counts and its reference implementation are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.parity.golden import Golden, levels
from benchmarks.parity.tuning import started
from benchmarks.reference import Reference
from benchmarks.rows import GPU_ROWS, ROWS, TASKS, Row, counted, least
from benchmarks.sized import Parts, parts

from tuneavideo.method.inflate import inflate

GOLDENS = Path(__file__).parent / "goldens"


def test_the_reference_step_has_the_losses_of_the_published_run() -> None:
    golden = Golden(GOLDENS / "train" / "official_checkpointing.safetensors")
    network = parts("tiny")
    video = started(GOLDENS / "sd15_tiny", golden.under("init."))
    reference = Reference(Parts(video.unet, network.vae, None, network.words), levels(), reentrant=True)
    optimizer = reference.optimizer()
    for index, expected in enumerate(golden["loss"]):
        clean, noise, t_B = (golden[name][index] for name in ("latents", "noise", "timesteps"))
        loss = reference.loss(clean, noise, t_B, golden["encoder_hidden_states"][index])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.tuned.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_a_step_needs_half_of_the_published_work_and_no_more_than_the_least() -> None:
    size: dict[str, Any] = {"frames": 2, "pixels": 512, "frozen": True}
    theirs, ours = counted(Row("reference-tune", **size)), counted(Row("tune", **size))
    assert theirs / 2 == pytest.approx(3.63e12, rel=0.05)
    assert ours <= 0.5 * theirs
    assert ours <= 1.05 * least(Row("tune", **size))


def test_a_step_that_trains_the_down_path_needs_no_more_than_the_least() -> None:
    row = Row("tune", base="miniature", frames=3, pixels=64)
    assert counted(row) <= 1.05 * least(row)


@torch.no_grad()
def test_the_reference_predicts_what_the_inflated_unet_does() -> None:
    network = parts("tiny")
    video = inflate(network.unet)
    for parameter in network.unet.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.01)
    x, t, text = torch.randn(1, 4, 3, 8, 8), torch.tensor([7]), torch.randn(1, 5, 24)
    ours = video(x, t, text)
    theirs = Reference(network, levels()).unet(x, t, text)
    assert (ours - theirs).abs().max() < 1e-3


def test_edits_of_the_reference_equal_ours_without_attention_injection() -> None:
    network, made = parts("tiny"), []
    for task in ("edits", "reference-edits"):
        torch.manual_seed(0)
        made.append(TASKS[task](Row(task, base="tiny", frames=3, pixels=64, injected=False), network, "cpu").step())
    assert len(made[0]) == len(made[1]) == 4
    assert all((ours - theirs).abs().max() < 1e-3 for ours, theirs in zip(*made, strict=True))


def test_rows_have_names_of_their_own() -> None:
    assert all(row.name == name for name, row in (ROWS | GPU_ROWS).items())
    assert len(GPU_ROWS) == 10


def test_attention_injection_needs_about_half_more_work() -> None:
    size: dict[str, Any] = {"base": "sd15", "frames": 4, "pixels": 512}
    assert counted(Row("inject", **size)) <= 1.55 * counted(Row("edit", **size))
