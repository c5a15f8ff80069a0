"""Memory estimates from a model's config, and the settings that fit into a given memory.

Tuning holds the frozen weights in their precision; of each trainable parameter its value, gradient and optimizer state,
4 bytes each, and a copy in half precision; and activations, which are linear in frames and in latents per frame.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tuneavideo.errors import MemoryShort
from tuneavideo.kernels import traced_on_meta
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import cache
from tuneavideo.training import memory_trace
from tuneavideo.version import __version__

GB = 1e9
# Kept free: a CUDA context and the workspaces of kernels, and a tenth of all activations for the allocator.
CONTEXT, WASTE = 0.6 * GB, 1.1
# Optimizer state of each trainable parameter in numbers of 4 bytes; other optimizers have two.
OPTIMIZER_STATE = {"adamw8bit": 0.5, "adafactor": 0.1}
SHORTEST = 8  # frames of a window that the plan chooses: fewer show no motion
FRAMES, SIDES = (4, 12), (16, 32)  # sizes in latents at which activations are measured


class Size(NamedTuple):
    """Frames of a clip, its height and width in pixels, and pixels per latent along each side."""

    frames: int
    height: float
    width: float
    stride: int

    @property
    def latents(self) -> int:
        """Latents per frame."""
        return round(self.height / self.stride) * round(self.width / self.stride)

    def window(self, settings: TuneSettings) -> int:
        """Return the number of frames that the UNet sees at once."""
        return min(settings.window or self.frames, self.frames)


class Activations(NamedTuple):
    """Bytes of activations of one clip in half precision: `frames * (a * latents + b) + c * latents + d`.

    `c` and `d` are small and negative: the first frames attend to one frame, the others to two.
    """

    a: float
    b: float
    c: float
    d: float

    @classmethod
    def of(cls, measured: Callable[[int, int], int]) -> Activations:
        """Fit the coefficients to `measured(frames, side)` at two numbers of frames and two sides in latents."""
        sizes = list(product(FRAMES, SIDES))
        terms = [[frames * side**2, frames, side**2, 1] for frames, side in sizes]
        return cls(*np.linalg.solve(terms, [measured(*size) for size in sizes]).tolist())

    def bytes(self, frames: int, latents: int) -> float:
        return frames * (self.a * latents + self.b) + self.c * latents + self.d


@dataclass(frozen=True)
class Model:
    """Parameters and activations of a base model.

    Attributes:
        frozen: Number of frozen parameters of the UNet.
        trainable: Number of trainable parameters of the UNet.
        others: Number of parameters of the VAE and the text encoders.
        checkpointed: Activations of a tuning step with gradient checkpointing.
        stored: Activations of a tuning step without it.
        prediction: Activations of a prediction.
        decoding: Bytes of activations for each latent of a frame that the VAE decodes, in half precision.
        width: Bytes of a frozen weight.
    """

    frozen: int
    trainable: int
    others: int
    checkpointed: Activations
    stored: Activations
    prediction: Activations
    decoding: float
    width: int = 2

    @classmethod
    def of(cls, pipe: Any, settings: TuneSettings, width: int, *, casts: bool, by_kernels: bool = False) -> Model:
        """Measure an image pipeline that is not inflated yet; the numbers are cached on disk.

        Args:
            pipe: The image pipeline.
            settings: Settings of the tuning.
            width: Bytes of a frozen weight.
            casts: Whether activations are those of autocast on a GPU (see `memory_trace.saved`).
            by_kernels: Whether the Triton kernels of `kernels` compute.
        """
        own = (settings.trainable_modules, settings.frozen_modules, settings.inflation, settings.lora_rank, casts)
        own += ("kernels",) * by_kernels
        name = cache.key("memory estimate", __version__, dict(pipe.unet.config), dict(pipe.vae.config), *own)
        measured = cache.cached(name, lambda: measure(pipe, settings, casts, by_kernels))
        (frozen, trainable), rows = measured["parameters"].tolist(), measured["activations"].tolist()
        modules = (pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None))
        others = sum(each.numel() for module in modules if module is not None for each in module.parameters())
        checkpointed, stored, prediction = (Activations(*row) for row in rows)
        decoding = float(measured["decoding"])
        return cls(frozen, trainable, others, checkpointed, stored, prediction, decoding, width)

    def tuning(self, plan: TuneSettings, size: Size) -> float:
        """Estimate the peak memory of a tuning step on one window, in bytes."""
        state = 4 * (2 + OPTIMIZER_STATE.get(plan.optimizer, 2) + plan.use_ema) + (self.width < 4) * self.width
        weights = self.frozen * self.width + self.trainable * state + self._others(plan)
        activations = self.checkpointed if plan.gradient_checkpointing else self.stored
        needed = activations.bytes(size.window(plan) * plan.train_batch_size, size.latents)
        return CONTEXT + weights + WASTE * needed * self.width / 2

    def editing(self, plan: TuneSettings, size: Size) -> float:
        """Estimate the peak memory of an edit in bytes; with previews, tuning's weights are in memory, too."""
        batch = plan.batch_prompts * (2 if plan.batch_guidance and plan.guidance_scale > 1 else 1)
        batch += plan.attention_injection > 0
        prediction = self.prediction.bytes(size.window(plan) * batch, size.latents)
        tuned = 4 * (2 + OPTIMIZER_STATE.get(plan.optimizer, 2)) if plan.validation_steps else 0
        weights = (self.frozen + self.trainable) * self.width + self.trainable * tuned + self._others(plan)
        return CONTEXT + weights + WASTE * max(prediction, self.decoding * size.latents) * self.width / 2

    def needed(self, plan: TuneSettings, size: Size) -> float:
        return max(self.tuning(plan, size), self.editing(plan, size))

    def _others(self, plan: TuneSettings) -> float:
        return 0 if plan.offload else self.others * self.width


def measure(pipe: Any, settings: TuneSettings, casts: bool, by_kernels: bool = False) -> dict[str, Tensor]:
    """Count parameters, and fit `Activations` of tuning with and without checkpointing and of a prediction."""
    video = memory_trace.blank_unet(pipe.unet.config, settings, by_kernels)
    trainable = sum(each.numel() for each in video.unet.parameters() if each.requires_grad)
    frozen = sum(each.numel() for each in video.unet.parameters()) - trainable
    with traced_on_meta() if by_kernels else nullcontext():
        fits = (
            Activations.of(lambda frames, side: memory_trace.saved(video, frames, side, side, True, casts)),
            Activations.of(lambda frames, side: memory_trace.saved(video, frames, side, side, False, casts)),
            Activations.of(lambda frames, side: memory_trace.predicted(video, frames, side, side)),
        )
    return {
        "parameters": torch.tensor([frozen, trainable]),
        "activations": torch.tensor(fits, dtype=torch.float64),
        "decoding": torch.tensor(memory_trace.decoded(pipe.vae.config, SIDES[1], SIDES[1]) / SIDES[1] ** 2),
    }


def choose(settings: TuneSettings, model: Model, room: float, size: Size) -> TuneSettings:
    """Choose the fastest settings that fit into `room` bytes; only fields that are not set may change.

    Raises:
        MemoryShort: Nothing fits; the message says what would.
    """
    plans = list(_plans(settings, size.frames))
    if fits := next((plan for plan in plans if model.needed(plan, size) <= room), None):
        return fits
    least = plans[-1]
    saving = least.model_copy(update={"gradient_checkpointing": True, "offload": True, "batch_guidance": False})
    if saving != least and model.needed(saving, size) <= room:
        flags = saving_flags(least, offload=True)
        raise MemoryShort(f"{_shortage(least, model, room, size)}; add {flags}", resume_flags=flags)
    raise MemoryShort(f"{_shortage(least, model, room, size)}; {_remedy(least, model, room, size)}", resume_flags=None)


def saving_flags(settings: TuneSettings, *, offload: bool) -> str:
    """Return the flags that save memory, leave the result as it is, and are off in `settings`.

    `offload` says whether the device has memory of its own, so that idle models can be moved to the host's.
    """
    flags = {
        "--gradient-checkpointing": not settings.gradient_checkpointing,
        "--offload": offload and not settings.offload,
        "--no-batch-guidance": settings.batch_guidance and settings.guidance_scale > 1,
    }
    return " ".join(flag for flag, needed in flags.items() if needed)


def describe_plan(before: TuneSettings, plan: TuneSettings, model: Model, room: float, size: Size) -> str:
    """Describe in one line what was chosen and what it needs."""
    words = {True: "on", False: "off", None: "all frames"}
    chosen = plan.model_fields_set - before.model_fields_set
    named = ("gradient_checkpointing", "offload", "optimizer", "batch_guidance", "window")
    values = [f"{name} {words.get(value := getattr(plan, name), value)}" for name in named if name in chosen]
    frames = f"{size.window(plan)} of {size.frames} frames of {size.width}x{size.height}"
    return (
        f"for {room / GB:.3g} GB: {', '.join(values) or 'all as set'}; tuning needs "
        f"{model.tuning(plan, size) / GB:.1f} GB, editing {model.editing(plan, size) / GB:.1f} GB ({frames}, frozen "
        f"weights of {model.width} bytes)"
    )


def _plans(settings: TuneSettings, frames: int) -> Iterator[TuneSettings]:
    """Yield what may be chosen, fastest first: the whole clip before windows, long windows before short ones."""
    free = TuneSettings.model_fields.keys() - settings.model_fields_set
    shortest = max(SHORTEST, (settings.window_overlap or 0) + 2)
    shorter = range(frames - 1, shortest - 1, -1) if "window" in free else ()
    small = "adamw8bit" if importlib.util.find_spec("bitsandbytes") else "adafactor"
    saving = [(*each, "adamw") for each in product((False, True), (False, True), (True, False))]
    if "optimizer" in free:  # it changes the result: after what does not
        saving += [(True, True, batched, small) for batched in (True, False)]
    for window in (settings.window, *shorter):
        for checkpointing, offload, batched, optimizer in saving:
            if window != settings.window and not (checkpointing and offload):
                continue
            values = {
                "gradient_checkpointing": checkpointing, "offload": offload, "batch_guidance": batched,
                "optimizer": optimizer,
            }  # fmt: skip
            changes = {name: value for name, value in values.items() if name in free}
            yield settings.model_copy(update=changes | {"window": window})


def _shortage(plan: TuneSettings, model: Model, room: float, size: Size) -> str:
    """Describe what `plan` needs and what is given."""
    need, window = model.needed(plan, size), size.window(plan)
    work = "tune" if model.tuning(plan, size) >= need else "edit"
    frames = f"{window} frames" if window == size.frames else f"of {size.frames} frames, windows of {window}"
    return f"{frames} of {size.width}x{size.height} need {need / GB:.1f} GB to {work}, {room / GB:.3g} GB are given"


def _remedy(plan: TuneSettings, model: Model, room: float, size: Size) -> str:
    """Name the number of frames or the resolution that fits."""

    def fits(frames: int, scale: float = 1.0) -> bool:
        smaller = Size(frames, size.height * scale, size.width * scale, size.stride)
        return model.needed(plan, smaller) <= room

    window, side = size.window(plan), round((size.height * size.width) ** 0.5)
    setting = "window" if plan.window else "num_frames"
    fewer = next((frames for frames in range(window - 1, 0, -1) if fits(frames)), None)
    smaller = next((each for each in range(side // 64 * 64, 63, -64) if fits(window, each / side)), None)
    ways = [f"{setting} to {fewer}"] * bool(fewer) + [f"resolution to {smaller}"] * bool(smaller)
    return f"lower {' or '.join(ways)}" if ways else "the weights alone leave no room for a frame"
