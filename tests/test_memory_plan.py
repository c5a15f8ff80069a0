"""Memory presets: estimates agree with the traced model, user settings stay, impossible budgets are refused."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st

from tests.shared.job import BRIEF
from tuneavideo import api, kernels
from tuneavideo.cli import main
from tuneavideo.config import layers
from tuneavideo.errors import MemoryShort, SettingsError
from tuneavideo.models import codec, devices, host_memory, pipelines
from tuneavideo.settings import TuneSettings
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.training import memory, memory_plan, memory_trace
from tuneavideo.training.memory import GB, Activations, Model, Size, choose, describe_plan

SIZES = {
    "sd1.5": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2.1": {
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
}  # fmt: skip
NEEDED = {"video": "-", "prompt": "-"}
# As counted for Stable Diffusion 1.5 on a GPU; `test_the_row_used_here_is_the_counted_one` keeps it true.
SD15 = Model(
    834_765_124, 74_354_880, 206_714_343,
    Activations(67_872.0, 6_400.0, -6_400.0, 288_000.0),
    Activations(326_042.5, 3_840.0, -56_400.0, 4_498_688.0),
    Activations(16_648.0, 121_472.0, 0.0, 118_280.0),
    98_312,
)  # fmt: skip

BY_KERNELS = Activations(42_392.0, 106_248.0, -3_840.0, 240_624.0)  # with gradient checkpointing


@cache
def video(name: str) -> Any:
    return memory_trace.blank_unet(SIZES[name], stated())


def stated(**values: Any) -> TuneSettings:
    return TuneSettings(**{**NEEDED, **values})


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("casts", [True, False])
def test_the_formula_is_the_count(name: str, checkpointing: bool, casts: bool) -> None:
    formula = Activations.of(
        lambda frames, side: memory_trace.saved(video(name), frames, side, side, checkpointing, casts)
    )
    for frames, height, width in ((4, 32, 32), (24, 96, 96), (9, 56, 72)):
        counted = memory_trace.saved(video(name), frames, height, width, checkpointing, casts)
        assert formula.bytes(frames, height * width) == pytest.approx(counted, rel=0.02)


# Bytes that steps at 512 x 512 allocated above what they held, in benchmarks/results/nvidia-h200-levers.json: the row
# of 24 frames, and `step_memory` less the memory after it.
MEASURED = {(24, True): 7.52 - 3.17, (12, False): 12.16 - 3.05}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize(("frames", "checkpointing"), MEASURED)
def test_what_is_counted_with_kernels_is_what_a_gpu_allocated(frames: int, checkpointing: bool) -> None:
    blank = memory_trace.blank_unet(SIZES["sd1.5"], stated(), by_kernels=True)
    with kernels.traced_on_meta():
        counted = memory_trace.saved(blank, frames, 64, 64, checkpointing, casts=True)
    assert counted / GB == pytest.approx(MEASURED[frames, checkpointing], rel=0.05)
    if checkpointing:
        assert BY_KERNELS.bytes(frames, 64 * 64) == pytest.approx(counted, rel=0.02)


def test_24_frames_fit_into_8_gb_with_kernels() -> None:
    model = replace(SD15, checkpointed=BY_KERNELS)
    made = choose(stated(), model, 8 * GB, Size(24, 512, 512, 8))
    assert made.window is None and made.offload and made.optimizer in ("adamw8bit", "adafactor")


def test_the_formula_of_predictions_is_the_count() -> None:
    formula = Activations.of(lambda frames, side: memory_trace.predicted(video("sd1.5"), frames, side, side))
    for batch, frames, side in ((1, 24, 64), (2, 8, 96)):
        counted = memory_trace.predicted(video("sd1.5"), frames, side, side, batch)
        assert formula.bytes(frames * batch, side**2) == pytest.approx(counted, rel=0.02)


def test_what_is_counted_as_saved_is_what_autograd_saves() -> None:
    """On real tensors, with attention whose maps are not kept: the fused kernel's."""
    torch.manual_seed(0)
    config = dict(SIZES["sd1.5"], block_out_channels=(32, 64), attention_head_dim=4, sample_size=16,
                  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip
    blank = memory_trace.blank_unet(config, stated(trainable_modules=("attn1.to_q", "attn_temp")))
    counted = memory_trace.saved(blank, 3, 16, 16, False)
    unet: Any = UNet2DConditionModel(**config).to(torch.bfloat16)
    real = memory_trace.inflate(unet.train())
    unet.requires_grad_(False)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("attn1.to_q" in name or "attn_temp" in name)
    saved = memory_trace.Saved(memory_trace.weights(unet))
    with saved:
        real(torch.randn(1, 4, 3, 16, 16), torch.tensor(5), torch.randn(1, 77, 768))
    assert counted == pytest.approx(saved.bytes, rel=0.1)


def test_what_norms_are_given_is_kept_in_full_precision_where_autocast_casts_it() -> None:
    """Against a norm, its activation and a layer after it, by hand."""
    kept = {}
    for casts in (False, True):
        saved, x = memory_trace.Saved(set()), torch.empty(1, 8, 16, 16, device="meta", dtype=torch.bfloat16)
        norm, layer = torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 8, 1)
        for each in (norm, layer):
            each.to("meta", torch.bfloat16).requires_grad_(False)
        saved.weights = memory_trace.weights(norm) | memory_trace.weights(layer)
        with saved, memory_trace._FusedAttention(casts):
            layer(torch.nn.functional.silu(norm(x.requires_grad_())))
        kept[casts] = [storage.nbytes() for storage in saved.storages.values() if storage.nbytes() >= x.nbytes]
    size = 8 * 16 * 16 * 2
    assert kept == {False: [size, size, size], True: [2 * size, 2 * size, size]}  # what each was given, in order


def test_the_row_used_here_is_the_counted_one() -> None:
    pipe = SimpleNamespace(
        unet=SimpleNamespace(config=SIZES["sd1.5"]),
        vae=SimpleNamespace(config={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
                                    "down_block_types": ("DownEncoderBlock2D",) * 4,
                                    "up_block_types": ("UpDecoderBlock2D",) * 4}),
    )  # fmt: skip
    measured = {name: each.tolist() for name, each in memory.measure(pipe, stated(), True).items()}
    assert measured["parameters"] == [SD15.frozen, SD15.trainable]
    assert measured["decoding"] == pytest.approx(SD15.decoding, rel=0.02)
    for row, own in zip(measured["activations"], (SD15.checkpointed, SD15.stored, SD15.prediction), strict=True):
        assert Activations(*row).bytes(8, 4096) == pytest.approx(own.bytes(8, 4096), rel=0.02)


def plan(room: float, frames: int = 24, side: int = 512, **values: Any) -> TuneSettings:
    return choose(stated(**values), SD15, room * GB, Size(frames, side, side, 8))


def test_the_more_memory_the_faster_the_settings() -> None:
    small, middle, large = plan(8), plan(16), plan(80)
    assert small.gradient_checkpointing and small.offload and small.window and small.window < 24
    assert middle.gradient_checkpointing and middle.window is None
    assert not large.gradient_checkpointing and not large.offload and large.window is None


@given(st.sampled_from([8, 12, 16, 24]), st.integers(1, 300), st.sampled_from([256, 512, 768]), st.booleans())
def test_what_is_chosen_fits_and_what_was_set_stays(room: int, frames: int, side: int, batched: bool) -> None:
    own = stated(batch_guidance=batched, gradient_checkpointing=True)
    try:
        made = choose(own, SD15, room * GB, Size(frames, side, side, 8))
    except MemoryShort as error:
        assert "\n" not in str(error) and f"{room} GB are given" in str(error)
        return
    assert SD15.needed(made, Size(frames, side, side, 8)) <= room * GB
    assert made.batch_guidance == batched and made.gradient_checkpointing
    assert made.window is None or memory.SHORTEST <= made.window < frames


def test_what_cannot_fit_is_refused_with_numbers_and_a_way_out() -> None:
    with pytest.raises(
        MemoryShort, match=r"24 frames of 768x768 need \S+ GB to tune, 8 GB are given; lower window to "
    ):
        plan(8, side=768, window=24)
    with pytest.raises(MemoryShort, match=r"8 frames of 1024x1024 need .* lower num_frames to \d or resolution to \d+"):
        plan(8, frames=8, side=1024)
    with pytest.raises(MemoryShort, match="the weights alone leave no room for a frame"):
        plan(2)


def test_the_way_out_fits() -> None:
    with pytest.raises(MemoryShort) as error:
        plan(8, side=768, window=24)
    words = str(error.value).split()
    window, side = int(words[words.index("window") + 2]), int(words[words.index("resolution") + 2])
    assert plan(8, side=768, window=window).window == window
    assert plan(8, side=side, window=24).window == 24
    with pytest.raises(MemoryShort):
        plan(8, side=768, window=window + 1)


@given(st.floats(2.5, 40))
def test_the_official_arithmetic_is_not_changed_by_memory(room: float) -> None:
    own = layers({**NEEDED, "preset": "official", "base": "sd1.4"}, {})
    try:
        made = plan(room, **own)
    except MemoryShort as error:
        assert re.search(r"lower (num_frames|resolution) to \d|no room for a frame", str(error))
        return
    saving = {"gradient_checkpointing", "offload", "batch_guidance"}
    assert made.model_dump(exclude=saving) == stated(**own).model_dump(exclude=saving)


def test_settings_that_save_memory_and_were_set_to_off_are_advised_if_they_are_enough() -> None:
    with pytest.raises(MemoryShort, match=r"; add --gradient-checkpointing --offload$") as error:
        plan(12, gradient_checkpointing=False, offload=False, batch_guidance=False)
    assert error.value.resume_flags == "--gradient-checkpointing --offload"
    plan(12, gradient_checkpointing=True, offload=True, batch_guidance=False)


def test_a_window_chosen_by_memory_turns_feature_reuse_off_and_one_that_was_set_refuses_it() -> None:
    clip: Any = SimpleNamespace(frames=24)
    own = stated(feature_reuse=2)
    made, line = memory_plan._without_reuse_in_windows(own, plan(8, feature_reuse=2), "for 8 GB", clip)
    assert made.window and made.feature_reuse == 1 and "feature_reuse 1 (was 2)" in line
    whole = plan(80, feature_reuse=2)
    assert memory_plan._without_reuse_in_windows(own, whole, "", clip) == (whole, "")
    own = stated(feature_reuse=2, window=8)
    with pytest.raises(SettingsError, match="feature_reuse 2 does not go with windows"):
        memory_plan._without_reuse_in_windows(own, own, "", clip)


def test_the_8_bit_optimizer_is_taken_where_it_is_installed_and_else_adafactor(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, there=there: there or None)
        taken = {plan(room / 2, frames=12).optimizer for room in range(13, 40)}
        assert taken == {"adamw", "adamw8bit" if there else "adafactor"}
        assert plan(8, optimizer="adamw").optimizer == "adamw"


def test_one_line_tells_what_was_chosen_and_why() -> None:
    own = stated(offload=True)
    made = choose(own, SD15, 8 * GB, Size(24, 512, 512, 8))
    line = describe_plan(own, made, SD15, 8 * GB, Size(24, 512, 512, 8))
    assert line.startswith("for 8 GB: ") and f"window {made.window}" in line and "needs" in line
    assert "gradient_checkpointing on" in line and "offload" not in line and "\n" not in line


# In a job


@pytest.fixture
def heard(capsys: pytest.CaptureFixture) -> Iterator[Any]:
    yield lambda: capsys.readouterr()


def test_a_job_with_a_preset_says_what_it_chose_and_keeps_it(
    base: Path, clip: Path, tmp_path: Path, heard: Any
) -> None:
    brief = {name: value for name, value in BRIEF.items() if name != "gradient_checkpointing"}
    flags = [word for name, value in brief.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    main.main(["tune", str(clip), "--prompt", "a square", "--base", str(base), *flags, "--memory", "8",
              "--out", str(tmp_path / "run"), "--edit", "a circle"])  # fmt: skip
    said = heard().err
    assert "for 8 GB: " in said and "gradient_checkpointing off" in said
    own = RunFolder.open(tmp_path / "run").read_settings()
    assert (own.memory, own.gradient_checkpointing, own.offload) == (8, False, False)


def test_a_flag_given_with_its_default_value_is_kept(base: Path, clip: Path, tmp_path: Path, heard: Any) -> None:
    words = ["tune", str(clip), "--prompt", "a square", "--base", str(base), "--memory", "8", "--num-frames", "3",
             "--max-train-steps", "1", "--gradient-checkpointing", "--out", str(tmp_path / "run")]  # fmt: skip
    main.main(words)
    assert "gradient_checkpointing" not in heard().err
    assert RunFolder.open(tmp_path / "run").read_settings().gradient_checkpointing


def test_offloaded_parts_work_when_they_are_called_and_give_what_they_gave(base: Path) -> None:
    pipe, kept = (pipelines.load_image_pipeline(str(base)) for _ in range(2))
    devices.offload(pipe)
    latents = torch.randn(1, 4, 2, 8, 8)
    told, before = (codec.embed(each, ["a square"]).text_BLD for each in (pipe, kept))
    assert torch.equal(told, before)
    assert (codec.decode(pipe, latents, 8.0)[0].frames_THWC == codec.decode(kept, latents, 8.0)[0].frames_THWC).all()
    assert pipe._execution_device == kept._execution_device


def test_a_run_with_offload_is_tuned_and_edited(base: Path, clip: Path, tmp_path: Path) -> None:
    run = api.tune(clip, "a square", edit=["a circle"], base=str(base), out=tmp_path / "run", offload=True, **BRIEF)
    assert (run / "edits/000-a-circle/edit.mp4").is_file()


@pytest.mark.parametrize(
    ("spare", "flags", "recomputed"),
    [
        (0.8, [], False),
        (0.0, [], True),
        (0.8, ["--preset", "official"], False),
        (1, ["--gradient-checkpointing"], True),
    ],
)
def test_on_a_cpu_nothing_is_computed_twice_if_a_step_fits_into_what_is_free(
    spare: float, flags: list[str], recomputed: bool, base: Path, clip: Path, tmp_path: Path, heard: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(devices, "used_memory", lambda _: 0)
    monkeypatch.setattr(host_memory, "free_and_total", lambda: (int(spare * GB), int(16 * GB)))
    main.main(["tune", str(clip), "--prompt", "a square", "--base", str(base), "--num-frames", "3", "--max-train-steps",
              "1", "--out", str(tmp_path / "run"), *flags])  # fmt: skip
    assert ("gradient_checkpointing off; tuning needs" in heard().err) is not recomputed
    assert RunFolder.open(tmp_path / "run").read_settings().gradient_checkpointing is recomputed
