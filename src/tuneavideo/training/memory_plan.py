"""Memory plan of a job, threads of a small model, and what to do when memory runs out."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from tuneavideo.config import check_windows
from tuneavideo.errors import MemoryShort, TuneAVideoError
from tuneavideo.models import codec, devices
from tuneavideo.models.loading import Pipeline
from tuneavideo.progress import Progress
from tuneavideo.settings import EditSettings, TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.training import memory
from tuneavideo.video import AnyVideo

Work = Generator[Progress, None, Any]

# Fraction of the free memory of a computer that a step may take: the rest is for others, and for what is not counted.
SPARE = 0.8
# Multiply-adds of a call of the UNet, at most, up to which a second thread costs more than it brings where other
# programs want the cores, too (docs/performance.md).
SMALL = 5e10


def fitted(
    settings: TuneSettings, accelerator: Accelerator, pipe: Pipeline, clip: AnyVideo
) -> tuple[TuneSettings, str]:
    """Settings that fit into the memory given or that of the device, and one line on what was chosen.

    On a CPU without `memory` one thing is chosen: nothing is computed twice if all of a step fits into what is free.
    The first process plans, with the least memory that any process has; all processes get its plan.

    Raises:
        MemoryShort: Nothing fits into the memory given or that of the GPU.
        SettingsError: `feature_reuse` is above 1 and the user has set a window.
    """
    room = min(gather_object([_room(settings, accelerator)]))
    plan: list[tuple[TuneSettings, str] | TuneAVideoError] = [(settings, "")]
    if accelerator.is_main_process:
        try:
            made, line = _planned(settings, accelerator, pipe, clip, room)
            plan = [_without_reuse_in_windows(settings, made, line, clip)]
        except TuneAVideoError as error:
            plan = [error]
    broadcast_object_list(plan)
    if isinstance(plan[0], TuneAVideoError):
        raise plan[0]
    return plan[0]


def _room(settings: TuneSettings, accelerator: Accelerator) -> float:
    """Bytes that this process may take."""
    device = accelerator.device
    if settings.memory:
        return settings.memory * memory.GB
    if device.type == "cuda":
        return float(devices.available_memory(device))
    return SPARE * devices.free_and_total(device)[0] / accelerator.num_processes + devices.used_memory(device)


def _planned(
    settings: TuneSettings, accelerator: Accelerator, pipe: Pipeline, clip: AnyVideo, room: float
) -> tuple[TuneSettings, str]:
    device, width = accelerator.device, devices.PRECISIONS[accelerator.mixed_precision].itemsize
    casts = device.type != "cpu" and width < 4
    size, stride = (clip.frames, clip.height, clip.width), codec.stride(pipe)
    if settings.memory or device.type == "cuda":
        model = memory.Model.of(pipe, settings, width, casts=casts)
        plan = memory.chosen(settings, model, room, size, stride)
        if settings.memory and not settings.mixed_precision:
            plan = plan.model_copy(update={"mixed_precision": accelerator.mixed_precision})
        return plan, memory.plan_line(settings, plan, model, room, size, stride)
    if "gradient_checkpointing" in settings.model_fields_set or device.type != "cpu":
        return settings, ""
    model = memory.Model.of(pipe, settings, width, casts=casts)
    plan = settings.model_copy(update={"gradient_checkpointing": False})
    window, sites = min(plan.window or clip.frames, clip.frames), (clip.height // stride) * (clip.width // stride)
    if model.tuning(plan, window, sites) > room:
        return settings, ""
    return plan, memory.plan_line(settings, plan, model, room, size, stride)


def _without_reuse_in_windows(
    settings: TuneSettings, plan: TuneSettings, line: str, clip: AnyVideo
) -> tuple[TuneSettings, str]:
    """A plan whose windows nobody asked for reuses no features; refused are windows that were asked for."""
    if settings.window is not None and settings.window < clip.frames:
        check_windows(plan, clip.frames)
    if plan.feature_reuse == 1 or (plan.window or clip.frames) >= clip.frames:
        return plan, line
    said = f"feature_reuse 1 (was {plan.feature_reuse}), since the clip is edited in windows"
    return plan.model_copy(update={"feature_reuse": 1}), f"{line}; {said}" if line else said


def threaded(work: Work, unet: nn.Module, frames: int, height: int, width: int) -> Work:
    """Steps of `work`, with one thread while they are computed on a CPU by a small model; else as they are.

    Between them and afterwards, PyTorch has as many threads as before. A user who has set `OMP_NUM_THREADS` or
    `MKL_NUM_THREADS` gets that many. Of a small model no call takes more than `SMALL` multiply-adds, as if every
    weight were applied to all latents, which number `height x width` in each of so many `frames`.
    """
    weight = next(unet.parameters())
    multiply_adds = sum(each.numel() for each in unet.parameters()) * frames * height * width
    stated = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys()
    if weight.device.type != "cpu" or multiply_adds > SMALL or stated:
        return (yield from work)
    with closing(work):
        while True:
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                step = next(work)
            except StopIteration as done:
                return done.value
            finally:
                torch.set_num_threads(before)
            yield step


@contextmanager
def memory_told(run: RunFolder, edits: EditSettings | None = None) -> Generator[None, None, None]:
    """Turn out-of-memory errors of a job in `run` into a `MemoryShort` that says which flags to add.

    `edits` are settings of edits only.
    """
    try:
        yield
    except Exception as error:
        if not devices.is_out_of_memory(error):
            raise
        device = torch.device(PartialState().device or "cpu")
        free, total = devices.free_and_total(device)
        said = (
            f"out of memory: this process holds {atomic.size(devices.used_memory(device))}, {atomic.size(free)} of "
            f"{atomic.size(total)} are free on {device}"
        )
        own = run.read_settings()
        flags = _saving_flags(own, edits, device, tuned=run.is_finished(own))
        advice = [f"add {flags}, which leaves the result as it is"] if flags else []
        raise MemoryShort(f"{said}; {', or '.join([*advice, _smaller(own)])}", resume_flags=flags or None) from error


def _saving_flags(own: TuneSettings, edits: EditSettings | None, device: torch.device, *, tuned: bool) -> str:
    """Flags that save memory of what was being done: tuning (and previews), or edits."""
    if edits:
        own = own.model_copy(update=edits.model_dump(include={"batch_guidance", "guidance_scale", "batch_prompts"}))
    if tuned:
        own = own.model_copy(update={"gradient_checkpointing": True})
    elif not own.validation_steps:
        own = own.model_copy(update={"batch_guidance": False})
    flags = memory.saving_flags(own, offload=device.type != "cpu" and edits is None)
    return f"{flags} --batch-prompts 1".strip() if tuned and own.batch_prompts > 1 else flags


def _smaller(own: TuneSettings) -> str:
    size = f"width x height (now {own.width} x {own.height})" if own.width else (
        f"resolution (now {own.resolution or 'that of the base'})"
    )  # fmt: skip
    batch = f" or train_batch_size (now {own.train_batch_size})" if own.train_batch_size > 1 else ""
    return f"start a new run with lower num_frames (now {own.num_frames}), {size}{batch}"
