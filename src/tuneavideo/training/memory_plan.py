"""Memory plan of a tuning, and advice for a job that runs out of memory."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from tuneavideo import kernels
from tuneavideo.config import check_windows
from tuneavideo.errors import MemoryShort, TuneAVideoError
from tuneavideo.models import codec, devices
from tuneavideo.models.loading import Pipeline
from tuneavideo.settings import EditSettings, TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.training import memory
from tuneavideo.video import AnyVideo

# Fraction of a computer's free memory that a step may take: other programs and what is not estimated need the rest.
SPARE = 0.8


def plan_memory(
    settings: TuneSettings, accelerator: Accelerator, pipe: Pipeline, clip: AnyVideo
) -> tuple[TuneSettings, str]:
    """Choose settings that fit into `settings.memory` or the memory of the device.

    On a CPU without `memory` only gradient checkpointing is chosen: it is off if a step fits without it. The first
    process plans, with the least memory that any process has, and all processes get its plan.

    Returns:
        The settings, and one line on what was chosen (empty if nothing was).

    Raises:
        MemoryShort: Nothing fits into the given memory or that of the GPU.
        SettingsError: `feature_reuse` is above 1 and the user has set a window.
    """
    room = min(gather_object([_room(settings, accelerator)]))
    plan: list[tuple[TuneSettings, str] | TuneAVideoError] = [(settings, "")]
    if accelerator.is_main_process:
        try:
            plan = [_without_reuse_in_windows(settings, *_plan(settings, accelerator, pipe, clip, room), clip)]
        except TuneAVideoError as error:
            plan = [error]
    broadcast_object_list(plan)
    if isinstance(plan[0], TuneAVideoError):
        raise plan[0]
    return plan[0]


def _room(settings: TuneSettings, accelerator: Accelerator) -> float:
    """Return the bytes that this process may take."""
    device = accelerator.device
    if settings.memory:
        return settings.memory * memory.GB
    if device.type == "cuda":
        return float(devices.available_memory(device))
    return SPARE * devices.free_and_total(device)[0] / accelerator.num_processes + devices.used_memory(device)


def _plan(
    settings: TuneSettings, accelerator: Accelerator, pipe: Pipeline, clip: AnyVideo, room: float
) -> tuple[TuneSettings, str]:
    device = accelerator.device
    chooses_all = bool(settings.memory) or device.type == "cuda"
    if not chooses_all and (device.type != "cpu" or "gradient_checkpointing" in settings.model_fields_set):
        return settings, ""
    model = _model(settings, accelerator, pipe)
    size = memory.Size(clip.frames, clip.height, clip.width, codec.stride(pipe))
    if chooses_all:
        plan = memory.choose(settings, model, room, size)
        if settings.memory and not settings.mixed_precision:
            plan = plan.model_copy(update={"mixed_precision": accelerator.mixed_precision})
    else:
        plan = settings.model_copy(update={"gradient_checkpointing": False})
        if model.tuning(plan, size) > room:
            return settings, ""
    return plan, memory.describe_plan(settings, plan, model, room, size)


def _model(settings: TuneSettings, accelerator: Accelerator, pipe: Pipeline) -> memory.Model:
    device, width = accelerator.device, devices.PRECISIONS[accelerator.mixed_precision].itemsize
    by_kernels = width < 4 and kernels.supports(torch.empty(1, device=device))
    return memory.Model.of(pipe, settings, width, casts=device.type != "cpu" and width < 4, by_kernels=by_kernels)


def bytes_for_more(settings: TuneSettings, accelerator: Accelerator, pipe: Pipeline, clip: AnyVideo) -> float:
    """Estimate the bytes that a tuning step needs for each further pixel of the clip, all frames together."""
    model, stride = _model(settings, accelerator, pipe), codec.stride(pipe)
    sizes = [memory.Size(frames, clip.height, clip.width, stride) for frames in (clip.frames, 2 * clip.frames)]
    one, two = (model.tuning(settings, size) for size in sizes)
    return (two - one) / (clip.frames * clip.height * clip.width)


def _without_reuse_in_windows(
    settings: TuneSettings, plan: TuneSettings, line: str, clip: AnyVideo
) -> tuple[TuneSettings, str]:
    """Turn feature reuse off in a plan that chose windows; refuse it in windows that the user set."""
    if settings.window is not None and settings.window < clip.frames:
        check_windows(plan, clip.frames)
    if plan.feature_reuse == 1 or (plan.window or clip.frames) >= clip.frames:
        return plan, line
    change = f"feature_reuse 1 (was {plan.feature_reuse}), since the clip is edited in windows"
    return plan.model_copy(update={"feature_reuse": 1}), f"{line}; {change}" if line else change


@contextmanager
def memory_advice(run: RunFolder, edits: EditSettings | None = None) -> Generator[None, None, None]:
    """Turn out-of-memory errors of a job in `run` into a `MemoryShort` that says which flags to add.

    `edits` are the settings of a job that only edits.
    """
    try:
        yield
    except Exception as error:
        if not devices.is_out_of_memory(error):
            raise
        device = torch.device(PartialState().device or "cpu")
        free, total = devices.free_and_total(device)
        state = (
            f"out of memory: this process holds {atomic.size(devices.used_memory(device))}, {atomic.size(free)} of "
            f"{atomic.size(total)} are free on {device}"
        )
        own = run.read_settings()
        flags = _saving_flags(own, edits, device, tuned=run.is_finished(own))
        advice = [f"add {flags}, which leaves the result as it is"] if flags else []
        raise MemoryShort(f"{state}; {', or '.join([*advice, _smaller(own)])}", resume_flags=flags or None) from error


def _saving_flags(own: TuneSettings, edits: EditSettings | None, device: torch.device, *, tuned: bool) -> str:
    """Return the flags that save memory in the stage that failed: tuning (and previews), or edits."""
    if edits:
        own = own.model_copy(update=edits.model_dump(include={"batch_guidance", "guidance_scale", "batch_prompts"}))
    if tuned:
        own = own.model_copy(update={"gradient_checkpointing": True})
    elif not own.validation_steps:
        own = own.model_copy(update={"batch_guidance": False})
    flags = memory.saving_flags(own, offload=device.type != "cpu" and edits is None)
    return f"{flags} --batch-prompts 1".strip() if tuned and own.batch_prompts > 1 else flags


def _smaller(own: TuneSettings) -> str:
    size = f"resolution (now {own.resolution or 'that of the base'})"
    if own.width:
        size = f"width x height (now {own.width} x {own.height})"
    batch = f" or train_batch_size (now {own.train_batch_size})" if own.train_batch_size > 1 else ""
    return f"start a new run with lower num_frames (now {own.num_frames}), {size}{batch}"
