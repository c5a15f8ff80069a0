"""Rows of the benchmark: a row is one task at one size, measured in its own process."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks import work
from benchmarks.parity.golden import levels
from benchmarks.reference import TUNED, Reference
from benchmarks.resident import Peak
from benchmarks.sized import Parts, parts
from tuneavideo.evaluation.flops import count_flops
from tuneavideo.kernels import channels_last
from tuneavideo.method import editing, inversion
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.deepcache import reusing
from tuneavideo.method.graphs import recording
from tuneavideo.method.inflate import VideoUNet, inflate, low_rank_parameters, trainable_parameters
from tuneavideo.method.tuning import Tuning
from tuneavideo.models.codec import at_once
from tuneavideo.settings import PRESETS, Sampling, TuneSettings
from tuneavideo.training.optimizers import make_optimizer

Task = Literal[
    "tune",
    "reference-tune",
    "invert",
    "reference-invert",
    "edit",
    "reference-edit",
    "inject",
    "decode",
    "reference-decode",
    "edits",
    "reference-edits",
]
PROMPTS, STEPS = 4, 5
"""Of `edits`; the published evaluation takes 50 steps, of which these are a tenth."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        task: A step of tuning, a step of inversion, a guided step of sampling, without and with attention injection,
            the decoding of a clip, or four edits, from the clip's latents to those of the edits, in a tenth of the
            steps.
        base: A name of `benchmarks.sized`.
        frames: Of the clip.
        pixels: Side of the clip.
        precision: Of the frozen weights and the computation.
        checkpointing: Activations computed twice.
        compiled: Transformer blocks compiled, each kind once.
        channels_last: Memory format of the UNet's convolutions (on a GPU it is that anyway).
        prompts: Edited in one batch.
        reused: Inner features are those of an earlier step (`feature_reuse`).
        injected: Of `edits`: with attention injection, as by default.
        fast: Of `edits`: as the preset `fast` makes them, in a tenth of its steps.
        frozen: Whether the down path learns nothing (as published).
        rank: Rank of the LoRAs that are trained (`lora_rank`); None for whole matrices.
        default: Whether it is measured without `--all`.
    """

    task: Task
    base: str = "sd15"
    frames: int = 8
    pixels: int = 256
    precision: str = "fp32"
    checkpointing: bool = False
    compiled: bool = False
    channels_last: bool = False
    prompts: int = 1
    reused: bool = False
    injected: bool = True
    fast: bool = False
    frozen: bool = False
    rank: int | None = None
    default: bool = True

    @property
    def name(self) -> str:
        words = ("checkpointing", "compiled", "channels_last", "frozen", "reused", "fast")
        more = [word for word in words if getattr(self, word)] + ["not_injected"] * (not self.injected)
        more += [f"rank_{self.rank}"] * bool(self.rank)
        more += [f"{self.prompts}-prompts"] * (self.prompts > 1) + [self.precision] * (self.precision != "fp32")
        return "-".join([self.task, self.base, f"{self.frames}x{self.pixels}", *more])


@dataclass
class Bench:
    """The call `step` that a row measures, and the model that it keeps in memory (`held`)."""

    step: Callable[[], Any]
    count: Callable[[], Any]


def measured(row: Row, *, device: str, seconds: float = 40.0) -> dict[str, Any]:
    """Run a row: a warm-up, then three times or for about `seconds`; rows that take `LONG` have no warm-up."""
    network = parts(row.base, device, DTYPES[row.precision])
    weights = Peak(device)
    bench = TASKS[row.task](row, network, device)
    warm = weights.timed(bench.step)
    first, first_peak = warm[0], weights.above()
    times: list[tuple[float, float]] = [warm] if row.task in LONG else []
    while len(times) < 3 or (sum(wall for wall, _ in times) < 2.0 and len(times) < 20):
        if times and sum(wall for wall, _ in times) + first > seconds:
            break
        times.append(weights.timed(bench.step))
    settled = Peak(device)
    if row.task not in LONG:
        bench.step()
    flops = counted(row)
    wall, computing = (statistics.median(each) for each in zip(*times, strict=True))
    threads = torch.get_num_threads() if device == "cpu" else 1
    busy = computing / threads if device == "cpu" else wall
    return {
        "seconds": round(wall, 4),
        "busy_seconds": round(busy, 4),
        "threads": threads,
        "first_seconds": round(first, 3),
        "peak_mb": round(max(first_peak, settled.above() + settled.base - weights.base) / 1e6),
        "activations_mb": round(settled.above() / 1e6),
        "tflop": round(flops / 1e12, 4),
        "gflop_per_second": round(flops / busy / 1e9, 1),
    }


def counted(row: Row) -> float:
    """Count the operations of the row's step on torch's meta device."""
    row = dataclasses.replace(row, precision="fp32")
    if row.task == "edits":
        return _counted_edits(row)
    return count_flops(TASKS[row.task](row, parts(row.base, "meta"), "meta").count)


def least(row: Row) -> float:
    """Return the least operations of a tuning step (see `work.Least`)."""
    network = parts(row.base, "meta")
    video, tuned = _learning(row, network)
    x, t, text = _inputs(row, network, "meta")
    total = work.least(lambda: video(x, t, text), video.unet, tuned, video.clip, network.words)
    return total.forward + total.backward


def matmul_rate(device: str, precision: str = "fp32") -> float:
    """Measure operations per second of a large matrix product: the best of six."""
    size, at_once = (
        (2048, 1) if device == "cpu" else (8192, 10)
    )  # on a GPU a smaller one is over while it is waited for
    a, b, c = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(3))
    clock = Peak(device)
    times = [clock.timed(lambda: [torch.mm(a, b, out=c) for _ in range(at_once)]) for _ in range(6)]
    best = min(busy / torch.get_num_threads() if device == "cpu" else wall for wall, busy in times)
    return 2.0 * size**3 * at_once / best


def _latents(row: Row, network: Parts, device: str, clips: int = 1) -> Tensor:
    side, channels = row.pixels // network.stride, network.unet.config.in_channels
    return torch.randn(clips, channels, row.frames, side, side, device=device)


def _inputs(row: Row, network: Parts, device: str, clips: int = 1) -> tuple[Tensor, Tensor, Conditions]:
    width = network.unet.config.cross_attention_dim
    text = Conditions(torch.randn(clips, network.words, width, device=device), network.pooled(clips, device))
    return _latents(row, network, device, clips), torch.tensor([500], device=device).expand(clips), text


def _learning(row: Row, network: Parts) -> tuple[VideoUNet, list[Any]]:
    """Inflate a UNet and enable gradients of the tuned layers."""
    video = inflate(network.unet)
    network.unet.requires_grad_(False).train()
    names = (TUNED, ("down_blocks",) if row.frozen else ())
    if row.rank:
        tuned = list(low_rank_parameters(network.unet, *names, row.rank).values())
    else:
        tuned = list(trainable_parameters(network.unet, *names).values())
    for parameter in tuned:
        parameter.requires_grad_(True)
    if row.checkpointing:
        network.unet.enable_gradient_checkpointing()
    return video, tuned


class Steps(Tuning):
    """Tuning with single steps as calls."""

    def step(self) -> None:
        loss, _ = self.accumulate(0)
        self.update(*torch.stack([loss, self.clip()]).tolist())
        self.number += 1
        self.recorder.finish_step()


def tune(row: Row, network: Parts, device: str) -> Bench:
    """Make a tuning step, by default without gradient checkpointing."""
    if device == "meta":
        video, _ = _learning(row, network)
        x, t, text = _inputs(row, network, device)
        return Bench(lambda: None, lambda: video(x, t, text).square().mean().backward())
    settings = TuneSettings(
        video="-", prompt="-", gradient_checkpointing=row.checkpointing, lora_rank=row.rank,
        frozen_modules=("down_blocks",) if row.frozen else (),
    )  # fmt: skip
    x, _, text = _inputs(row, network, device)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no" if row.precision == "fp32" else row.precision)
    video = _prepared(row, inflate(network.unet, settings.inflation))
    tuning = Steps(video, levels(), {"mean": x, "std": torch.ones_like(x)}, text, settings, accelerator, make_optimizer)
    return Bench(tuning.step, lambda: None)


def _prepared(row: Row, video: VideoUNet) -> VideoUNet:
    channels_last.optimise(video.unet)
    if row.channels_last:
        torch.nn.Module.to(video.unet, memory_format=torch.channels_last)
    if row.compiled:
        video.unet.compile_repeated_blocks(dynamic=False)
    return video


def reference_tune(row: Row, network: Parts, device: str) -> Bench:
    reference = Reference(network, levels(), reentrant=row.frozen)
    for parameter in reference.tuned.values():
        parameter.data = parameter.data.float()
    pixels = torch.randn(row.frames, 3, row.pixels, row.pixels, device=device)
    ids = torch.zeros(1, network.words, dtype=torch.long, device=device)
    optimizer = reference.optimizer()

    def step() -> None:
        with torch.autocast(device, DTYPES[row.precision], enabled=row.precision != "fp32"):
            reference.step(optimizer, pixels, ids)

    return Bench(step, lambda: reference.gradients(pixels, ids))


def invert(row: Row, network: Parts, device: str) -> Bench:
    return _called(row, network, device, clips=1)


def edit(row: Row, network: Parts, device: str) -> Bench:
    """Make a guided step of all prompts."""
    return _called(row, network, device, clips=2 * row.prompts)


def inject(row: Row, network: Parts, device: str) -> Bench:
    """Make a guided step with the source's clip beside all prompts."""
    return _called(row, network, device, clips=2 * row.prompts + 1, injects=True)


def _called(row: Row, network: Parts, device: str, clips: int, injects: bool = False) -> Bench:
    video = _prepared(row, inflate(network.unet.requires_grad_(False)))
    video.clip.inject = injects
    x, t, text = _inputs(row, network, device, clips)
    video = reusing(recording(video), 1_000_000 if row.reused else 1)
    call = torch.no_grad()(lambda: video(x, t[0], text))
    if row.reused:
        call()
    return Bench(call, call)


def reference_invert(row: Row, network: Parts, device: str) -> Bench:
    return _reference_called(row, network, device, clips=1)


def reference_edit(row: Row, network: Parts, device: str) -> Bench:
    return _reference_called(row, network, device, clips=2)


def _reference_called(row: Row, network: Parts, device: str, clips: int) -> Bench:
    reference = Reference(network, levels())
    network.unet.eval()
    x, t, conditions = _inputs(row, network, device, clips)
    x, text = (part.to(DTYPES[row.precision]) for part in (x, conditions.text_BLD))
    call = torch.no_grad()(lambda: reference.unet(x, t, text))
    return Bench(call, call)


def edits(row: Row, network: Parts, device: str) -> Bench:
    """Make an inversion with four edits, `row.prompts` at a time."""
    video = _prepared(row, inflate(network.unet.requires_grad_(False)))
    x, _, conditions = _inputs(row, network, device, clips=2)
    clean, (empty, text) = x[:1], conditions.split(1)
    settings, texts = _sampling(row), text.expand(row.prompts)

    def run() -> list[Tensor]:
        path = inversion.path_to(
            editing.sampler_of(levels(), settings), levels(), settings.num_inference_steps, "trailing"
        )
        *_, inverted = editing.invert(video, levels(), clean, empty, path)
        trajectory, made = inverted.trajectory, []
        for _ in range(PROMPTS // row.prompts):
            reused, sampler = reusing(video, settings.feature_reuse), editing.sampler_of(levels(), settings)
            *_, last = editing.edit(reused, levels(), sampler, settings, trajectory, clean, text, texts, empty)
            made += last.latents.split(1)
        return made

    return Bench(run, run)


def _sampling(row: Row) -> Sampling:
    """Return the settings of the edits, with a tenth of the steps."""
    settings: dict[str, Any] = {"num_inference_steps": 50, **(PRESETS["fast"] if row.fast else {})}
    settings["num_inference_steps"] *= STEPS / 50
    return Sampling(**settings, **({} if row.injected else {"attention_injection": 0.0}))


def _counted_edits(row: Row) -> float:
    """Count the operations of `edits` from those of its calls."""
    settings = _sampling(row)
    steps, every, share = settings.num_inference_steps, settings.feature_reuse, settings.attention_injection

    def call(clips: int, reused: bool = False) -> float:
        one = dataclasses.replace(row, task="edit", reused=reused)
        return count_flops(_called(one, parts(row.base, "meta"), "meta", clips).count)

    calls = [(2 * row.prompts + (number < share * steps), number % every > 0) for number in range(steps)]
    return steps * call(1) + PROMPTS // row.prompts * sum(call(*each) for each in calls)


def reference_edits(row: Row, network: Parts, device: str) -> Bench:
    reference = Reference(network, levels())
    network.unet.eval()
    x, _, conditions = _inputs(row, network, device, clips=2)
    x, texts = (part.to(DTYPES[row.precision]) for part in (x[:1], conditions.text_BLD))
    grid = levels().inversion_grid(STEPS, "trailing")

    def run() -> list[Tensor]:
        start = reference.inverted(x, texts[:1], grid)
        return [reference.sampled(start, texts, grid[::-1], 12.5) for _ in range(PROMPTS)]

    return Bench(run, run)


def decode(row: Row, network: Parts, device: str) -> Bench:
    """Decode a clip, on a GPU a few frames at a time."""
    channels_last.optimise(network.vae)
    return _decoded(row, network, device, at_once(torch.device(device)))


def reference_decode(row: Row, network: Parts, device: str) -> Bench:
    """Decode a clip frame by frame."""
    return _decoded(row, network, device, 1)


def _decoded(row: Row, network: Parts, device: str, size: int) -> Bench:
    channels = network.vae.config.latent_channels
    latents_NCHW = _latents(row, network, device)[0, :channels].movedim(1, 0).to(DTYPES[row.precision])

    @torch.no_grad()
    def run() -> None:
        for frames_NCHW in latents_NCHW.split(size):
            network.vae.decode(frames_NCHW).sample.float().cpu()

    count = torch.no_grad()(lambda: [network.vae.decode(frame_NCHW).sample for frame_NCHW in latents_NCHW.split(1)])
    return Bench(run, count)


TASKS: dict[str, Callable[[Row, Parts, str], Bench]] = {
    "tune": tune, "reference-tune": reference_tune, "invert": invert, "reference-invert": reference_invert,
    "edit": edit, "reference-edit": reference_edit, "inject": inject, "edits": edits,
    "reference-edits": reference_edits, "decode": decode, "reference-decode": reference_decode,
}  # fmt: skip
LONG = ("edits", "reference-edits")

_MINI = {"base": "miniature", "pixels": 64}
_SMALL = {"frames": 4, "pixels": 128}
_LENGTHS = {"precision": "bf16", "pixels": 128}
_QUICK = (
    *(Row(task, precision=precision) for task in ("reference-tune", "tune") for precision in DTYPES),
    *(Row("tune", precision=precision, checkpointing=True) for precision in DTYPES),
    *(Row(task, precision="bf16") for task in ("reference-edit", "edit", "invert", "decode")),
    *(Row(task, **_MINI) for task in ("reference-tune", "tune", "invert", "reference-edit", "edit", "decode")),
    *(
        Row(task, base=base, **_SMALL)
        for task, base in (("tune", "sd15"), ("tune", "sd21"), ("edit", "sd21"), ("invert", "xl"))
    ),
)
_MORE = (
    *(Row("reference-edits", precision=precision) for precision in DTYPES),
    *(
        Row("edits", precision=precision, **change)
        for precision in DTYPES
        for change in ({}, {"injected": False}, {"prompts": 4}, {"fast": True})
    ),
    Row("reference-tune", frozen=True),
    Row("tune", frozen=True),
    *(Row(task) for task in ("reference-invert", "invert", "reference-edit", "edit", "decode")),
    *(Row("edit", precision=precision, reused=True) for precision in DTYPES),
    Row("edit", **_MINI, prompts=4),
    Row("edit", **_MINI, reused=True),
    Row("tune", **_MINI, checkpointing=True),
    Row("tune", **_MINI, rank=16),
    Row("tune", **_SMALL, rank=16),
    *(Row(task, **_LENGTHS, frames=frames) for task in ("tune", "invert") for frames in (4, 8, 16, 32, 64, 128)),
    *(Row("tune", precision="bf16", frames=4, pixels=pixels) for pixels in (256, 384, 512)),
    *(Row("invert", precision="bf16", frames=4, pixels=pixels) for pixels in (256, 384, 512, 768)),
    Row("tune", base="sd21", precision="bf16"),
    *(Row(task, base="xl", precision="bf16", **_SMALL) for task in ("tune", "edit")),  # 22 GB and more in full
    *(Row(task, channels_last=True) for task in ("tune", "edit")),
    *(Row(task, **_MINI, **{layout: True}) for layout in ("compiled", "channels_last") for task in ("tune", "edit")),
    *(Row("edit", precision=precision, compiled=True) for precision in DTYPES),
    *(Row("tune", precision=precision, compiled=True) for precision in DTYPES),
)
ROWS = {row.name: dataclasses.replace(row, default=row in _QUICK) for row in (*_QUICK, *_MORE)}

_CARD = {"precision": "bf16", "frames": 12, "pixels": 512}
GPU_ROWS = {
    row.name: row
    for row in (
        *(Row(task, **_CARD) for task in ("tune", "edit", "inject", "invert", "decode")),
        *(Row(task, **_CARD) for task in ("reference-tune", "reference-edit", "reference-decode")),
        Row("tune", **_CARD, checkpointing=True),
        Row("tune", precision="bf16", frames=24, pixels=512, checkpointing=True),
    )
}


def described(row: Row) -> dict[str, Any]:
    """Return a row's fields, without `default`."""
    return {name: value for name, value in dataclasses.asdict(row).items() if name != "default"}
