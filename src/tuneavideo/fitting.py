"""What memory there is, made use of before a job and told of when it runs out."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState

from tuneavideo import budget, files, models
from tuneavideo.errors import MemoryShort
from tuneavideo.opening import Pipeline
from tuneavideo.settings import Sampling, TuneSettings
from tuneavideo.video import Spool, Video

# Of the free memory of a computer, what a step may take: the rest is for others, and for what is not counted.
SPARE = 0.8


def fitted(
    settings: TuneSettings, accelerator: Accelerator, pipe: Pipeline, clip: Video | Spool
) -> tuple[TuneSettings, str]:
    """Settings that fit into the memory given or that of the GPU, and what there is to tell of them.

    On a CPU without `memory` one thing is chosen: nothing is computed twice if all of a step fits into what is free.

    Raises:
        MemoryShort: Nothing fits into the memory given or that of the GPU.
    """
    device, width = accelerator.device, models.PRECISIONS[accelerator.mixed_precision].itemsize
    casts = device.type != "cpu" and width < 4
    size, stride = (clip.frames, clip.height, clip.width), models.stride(pipe)
    if settings.memory or device.type == "cuda":
        room = settings.memory * budget.GB if settings.memory else float(models.memory_to_take(device))
        model = budget.Model.of(pipe, settings, width, casts=casts)
        plan = budget.chosen(settings, model, room, size, stride)
        if settings.memory and not settings.mixed_precision:
            plan = plan.model_copy(update={"mixed_precision": accelerator.mixed_precision})
        return plan, budget.told(settings, plan, model, room, size, stride)
    if "gradient_checkpointing" in settings.model_fields_set or device.type != "cpu":
        return settings, ""
    model = budget.Model.of(pipe, settings, width, casts=casts)
    plan = settings.model_copy(update={"gradient_checkpointing": False})
    room = SPARE * models.memory_left(device)[0] / accelerator.num_processes + models.memory(device)
    window, sites = min(plan.window or clip.frames, clip.frames), (clip.height // stride) * (clip.width // stride)
    if model.tuning(plan, window, sites) > room:
        return settings, ""
    return plan, budget.told(settings, plan, model, room, size, stride)


@contextmanager
def memory_told(own: TuneSettings, edits: Sampling | None = None) -> Generator[None, None, None]:
    """Say what to lower when memory is at its end: in tuning with settings `own`, or in `edits` of that run."""
    try:
        yield
    except Exception as error:
        if not models.is_out_of_memory(error):
            raise
        device = torch.device(PartialState().device or "cpu")
        free, total = models.memory_left(device)
        size = f"width x height (now {own.width} x {own.height})" if own.width else (
            f"resolution (now {own.resolution or 'that of the base'})"
        )  # fmt: skip
        advice = [f"lower num_frames (now {own.num_frames}) or {size}"]
        if not edits and own.train_batch_size > 1:
            advice.append(f"lower train_batch_size (now {own.train_batch_size})")
        if not edits and not own.gradient_checkpointing:
            advice.append("turn gradient_checkpointing on (now off)")
        if (edits or own).batch_guidance:
            advice.append("turn batch_guidance off (now on)")
        raise MemoryShort(
            f"out of memory: this process holds {files.size(models.memory(device))}, {files.size(free)} of "
            f"{files.size(total)} are free on {device}; {', or '.join(advice)}"
        ) from error
