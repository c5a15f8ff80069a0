"""Which settings fit into a memory, by arithmetic on the model's config and the frame count.

What tuning holds: frozen weights as they are kept; of every number that learns its value, gradient and what the
optimiser remembers, in 4 bytes each, and a copy in half precision; activations. Activations are
linear in frames and in latents of a frame, from four counts at small sizes (see `counting`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuneavideo.errors import MemoryShort
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import cache
from tuneavideo.training import memory_trace
from tuneavideo.version import __version__

GB = 1e9
# Kept free: a CUDA context and the workspaces of kernels, and a tenth of all activations for the allocator.
CONTEXT, WASTE = 0.6 * GB, 1.1
# What an optimiser remembers of each number that learns, in numbers of 4 bytes; the others remember two.
REMEMBERED = {"adamw8bit": 0.5, "adafactor": 0.1}
SHORTEST = 8  # frames of a window that is chosen, not set: fewer show no motion
FRAMES, SIDES = (4, 12), (16, 32)  # of the latents that are counted


@dataclass(frozen=True)
class Activations:
    """Bytes of activations of one clip in half precision: `frames * (a * sites + b) + c * sites + d`.

    The last two are small and negative: the first frames look at one frame, the others at two.
    """

    a: float
    b: float
    c: float
    d: float

    @classmethod
    def of(cls, count: Callable[[int, int], int]) -> Activations:
        """From what `count` says of two numbers of frames at two sizes."""
        (few, many), (small, large) = FRAMES, (side**2 for side in SIDES)
        slopes, starts = [], []
        for side in SIDES:
            low, high = count(few, side), count(many, side)
            slopes.append((high - low) / (many - few))
            starts.append(low - slopes[-1] * few)
        a, c = ((two - one) / (large - small) for one, two in (slopes, starts))
        return cls(a, slopes[0] - a * small, c, starts[0] - c * small)

    def bytes(self, frames: int, sites: int) -> float:
        """Of `frames` frames with so many latents each."""
        return frames * (self.a * sites + self.b) + self.c * sites + self.d


@dataclass(frozen=True)
class Model:
    """What memory hangs on. Numbers of parameters; activations of tuning (recomputed, or all kept) and of a prediction.

    Attributes:
        width: Bytes of a frozen weight.
    """

    frozen: int
    learned: int
    others: int
    recomputed: Activations
    kept: Activations
    seen: Activations
    painted: float
    width: int = 2

    @classmethod
    def of(cls, pipe: Any, settings: TuneSettings, width: int, *, casts: bool) -> Model:
        """Of an image pipeline, not inflated yet, whose frozen weights take `width` bytes. Counted once, and kept.

        With `casts` it is tuned as autocast computes on a GPU (see `counting.saved`).
        """
        hangs_on = (
            settings.trainable_modules, settings.frozen_modules, settings.inflation, settings.lora_rank, casts,
        )  # fmt: skip
        name = cache.key("memory", __version__, dict(pipe.unet.config), dict(pipe.vae.config), *hangs_on)
        counts = cache.cached(name, lambda: {"counts": _counts(pipe, settings, casts)})["counts"].tolist()
        others = sum(each.numel() for part in _beside(pipe) for each in part.parameters())
        recomputed, kept, seen = (Activations(*counts[at : at + 4]) for at in (3, 7, 11))
        return cls(int(counts[0]), int(counts[1]), others, recomputed, kept, seen, counts[2], width)

    def tuning(self, plan: TuneSettings, frames: int, sites: int) -> float:
        """Bytes at the worst moment of a step on a window of `frames` frames with `sites` latents each."""
        optimiser = 4 * (2 + REMEMBERED.get(plan.optimizer, 2) + plan.use_ema) + (self.width < 4) * self.width
        weights = self.frozen * self.width + self.learned * optimiser + self._others(plan)
        activations = self.recomputed if plan.gradient_checkpointing else self.kept
        return CONTEXT + weights + WASTE * self._wide(activations.bytes(frames * plan.train_batch_size, sites))

    def editing(self, plan: TuneSettings, frames: int, sites: int) -> float:
        """Bytes at the worst moment of an edit; if there are previews, beside what tuning keeps."""
        batch = plan.batch_prompts * (2 if plan.batch_guidance and plan.guidance_scale != 1 else 1)
        batch += plan.attention_injection > 0
        activations = max(self._wide(self.seen.bytes(frames * batch, sites)), self._wide(self.painted * sites))
        tuned = 4 * (2 + REMEMBERED.get(plan.optimizer, 2)) if plan.validation_steps else 0
        weights = (self.frozen + self.learned) * self.width + self.learned * tuned
        return CONTEXT + weights + self._others(plan) + WASTE * activations

    def needed(self, plan: TuneSettings, frames: int, sites: int) -> float:
        return max(self.tuning(plan, frames, sites), self.editing(plan, frames, sites))

    def _others(self, plan: TuneSettings) -> float:
        return 0 if plan.offload else self.others * self.width

    def _wide(self, activations: float) -> float:
        return activations * self.width / 2


def _beside(pipe: Any) -> list[Any]:
    """The models beside the UNet."""
    parts = (pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None))
    return [part for part in parts if part is not None]


def _counts(pipe: Any, settings: TuneSettings, casts: bool) -> Tensor:
    """The numbers of `Model`, in one row."""
    video = memory_trace.blank_unet(
        pipe.unet.config, settings.trainable_modules, settings.frozen_modules, settings.inflation, settings.lora_rank
    )
    learned = sum(each.numel() for each in video.unet.parameters() if each.requires_grad)
    every = sum(each.numel() for each in video.unet.parameters())
    painted = memory_trace.painted(pipe.vae.config, SIDES[1], SIDES[1]) / SIDES[1] ** 2
    activations = (
        Activations.of(lambda frames, side: memory_trace.saved(video, frames, side, side, True, casts)),
        Activations.of(lambda frames, side: memory_trace.saved(video, frames, side, side, False, casts)),
        Activations.of(lambda frames, side: memory_trace.seen(video, frames, side, side)),
    )
    rows = [number for each in activations for number in (each.a, each.b, each.c, each.d)]
    return torch.tensor([every - learned, learned, painted, *rows], dtype=torch.float64)


def chosen(settings: TuneSettings, model: Model, room: float, size: tuple[int, int, int], stride: int) -> TuneSettings:
    """The fastest settings that fit into `room` bytes; what the user set stays as it is.

    Args:
        settings: As stated; fields that nobody set may be chosen.
        model: What memory hangs on.
        room: Bytes given.
        size: Frames, height and width in pixels.
        stride: Pixels per latent along each side.

    Raises:
        MemoryShort: Nothing fits; the message says what would.
    """
    frames, sites = size[0], (size[1] // stride) * (size[2] // stride)
    for plan in _plans(settings, frames):
        if model.needed(plan, min(plan.window or frames, frames), sites) <= room:
            return plan
    *_, least = _plans(settings, frames)
    saving = least.model_copy(update={"gradient_checkpointing": True, "offload": True, "batch_guidance": False})
    if saving != least and model.needed(saving, min(least.window or frames, frames), sites) <= room:
        flags = saving_flags(least, offload=True)
        raise MemoryShort(f"{_short(least, model, room, size, stride)}; add {flags}", resume_flags=flags)
    raise MemoryShort(_refusal(least, model, room, size, stride), resume_flags=None)


def saving_flags(settings: TuneSettings, *, offload: bool) -> str:
    """Flags that turn on what saves memory in `settings` and is off; the result stays what it is.

    `offload` says whether there is another memory to put idle models into.
    """
    flags = {
        "--gradient-checkpointing": not settings.gradient_checkpointing,
        "--offload": offload and not settings.offload,
        "--no-batch-guidance": settings.batch_guidance and settings.guidance_scale != 1,
    }
    return " ".join(flag for flag, needed in flags.items() if needed)


def plan_line(
    before: TuneSettings, plan: TuneSettings, model: Model, room: float, size: tuple[int, int, int], stride: int
) -> str:
    """What was chosen and why, in one line."""
    frames, sites = size[0], (size[1] // stride) * (size[2] // stride)
    window = min(plan.window or frames, frames)
    named = ("gradient_checkpointing", "offload", "optimizer", "batch_guidance", "window")
    own = plan.model_fields_set - before.model_fields_set
    values = [f"{name} {_word(getattr(plan, name))}" for name in named if name in own]
    tuning, editing = model.tuning(plan, window, sites) / GB, model.editing(plan, window, sites) / GB
    shown = f"{window} of {frames} frames of {size[2]}x{size[1]}, frozen weights of {model.width} bytes"
    needs = f"tuning needs {tuning:.1f} GB, editing {editing:.1f} GB ({shown})"
    return f"for {room / GB:.3g} GB: {', '.join(values) or 'all as set'}; {needs}"


def _word(value: Any) -> str:
    return {True: "on", False: "off", None: "all frames"}.get(value, str(value))


def _plans(settings: TuneSettings, frames: int) -> Iterator[TuneSettings]:
    """What may be chosen, fastest first: whole clips before windows, then the longest window."""
    shortest = max(SHORTEST, (settings.window_overlap or 0) + 2)
    chosen = "window" not in settings.model_fields_set
    windows = [None, *range(frames - 1, shortest - 1, -1)] if chosen else [settings.window]
    eight = "optimizer" not in settings.model_fields_set and importlib.util.find_spec("bitsandbytes") is not None
    ways = [(False, False), (False, True), (True, False), (True, True)]
    for window in windows:
        for recompute, offload in ways if window == windows[0] else ways[-1:]:
            for batched in (True, False):
                for optimizer in ("adamw", "adamw8bit") if eight and recompute else ("adamw",):
                    wished = {
                        "gradient_checkpointing": recompute, "offload": offload, "batch_guidance": batched,
                        "optimizer": optimizer, "window": window,
                    }  # fmt: skip
                    free = {name: value for name, value in wished.items() if name not in settings.model_fields_set}
                    yield settings.model_copy(update=free | {"window": window})


def _short(plan: TuneSettings, model: Model, room: float, size: tuple[int, int, int], stride: int) -> str:
    """What `plan` needs and what is given."""
    frames, height, width = size
    shown, sites = min(plan.window or frames, frames), (height // stride) * (width // stride)
    need = model.needed(plan, shown, sites)
    work = "tune" if model.tuning(plan, shown, sites) >= need else "edit"
    what = f"{shown} frames" if shown == frames else f"of {frames} frames, windows of {shown}"
    return f"{what} of {width}x{height} need {need / GB:.1f} GB to {work}, {room / GB:.3g} GB are given"


def _refusal(plan: TuneSettings, model: Model, room: float, size: tuple[int, int, int], stride: int) -> str:
    frames, height, width = size
    shown = min(plan.window or frames, frames)

    def need(count: int, scale: float = 1.0) -> float:
        return model.needed(plan, count, round(height * scale / stride) * round(width * scale / stride))

    said = _short(plan, model, room, size, stride)
    setting = "window" if plan.window else "num_frames"
    fewer = next((count for count in range(shown - 1, 0, -1) if need(count) <= room), None)
    side = round((height * width) ** 0.5)
    smaller = next((each for each in range(side // 64 * 64, 63, -64) if need(shown, each / side) <= room), None)
    ways = [f"{setting} to {fewer}"] * bool(fewer) + [f"resolution to {smaller}"] * bool(smaller)
    return f"{said}; lower {' or '.join(ways)}" if ways else f"{said}; the weights alone leave no room for a frame"
