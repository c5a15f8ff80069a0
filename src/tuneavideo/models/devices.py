"""Devices: precision, offloading, memory in use and free, out-of-memory errors, threads."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import closing
from typing import Any

import psutil
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import CpuOffload

from tuneavideo.errors import SettingsError
from tuneavideo.models import host_memory
from tuneavideo.models.loading import Pipeline

# Most multiply-adds of a UNet call for which one thread is as fast as two while other programs use the cores
# (docs/performance.md).
SMALL = 5e10
PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precision(requested: str | None, *, low: bool = False) -> str:
    """`no`, `fp16` or `bf16`: as requested, or bf16 on a device that computes in it and full precision elsewhere.

    Where memory is `low`, a GPU that has no bf16 takes fp16.
    """
    if requested == "fp16" and not torch.accelerator.is_available():
        raise SettingsError("mixed_precision fp16 needs a GPU; take bf16, or no")
    if requested is not None:
        return requested
    if torch.cuda.is_available():
        computes = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if computes else "fp16" if low else "no"
    return "bf16" if has_bf16() and not torch.accelerator.is_available() else "no"


def has_bf16() -> bool:
    """Whether this CPU has instructions for bf16; without them it is slower than float32."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def offload(pipe: Pipeline) -> None:
    """Keep VAE and text encoder in the computer's memory but for the moments in which they work."""
    device = pipe._execution_device
    for part in (pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            cpu_offload_with_hook(part, device)


def unload(part: Any) -> None:
    """Put a part that is offloaded away again."""
    if isinstance(getattr(part, "_hf_hook", None), CpuOffload):
        part.to("cpu")


def used_memory(device: torch.device) -> int:
    """Bytes in use: the most a GPU has held so far, or what this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def reset_peak_memory(device: torch.device) -> None:
    """Let `used_memory` of a GPU count from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Free and whole memory of a device, in bytes."""
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else host_memory.free_and_total()


def available_memory(device: torch.device) -> int:
    """Bytes that a job on a GPU may take: what is free, and what this process has of it already."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says, in one of the ways that torch, numpy and the system have, that memory is at its end."""
    messages = ("out of memory", "not enough memory", "allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in messages)


def single_threaded(
    work: Generator[Any, None, Any], unet: torch.nn.Module, frames: int, height: int, width: int
) -> Generator[Any, None, Any]:
    """Run each step of `work` on one thread if the model is small, on a CPU, and the user has set no thread count.

    Between the steps PyTorch has as many threads as before.

    Args:
        work: Steps to run.
        unet: Counts as small if every weight applied to all latents makes at most `SMALL` multiply-adds.
        frames: Of the clip.
        height: In latents.
        width: In latents.
    """
    parameters = list(unet.parameters())
    multiply_adds = sum(each.numel() for each in parameters) * frames * height * width
    is_set = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys()
    if parameters[0].device.type != "cpu" or multiply_adds > SMALL or is_set:
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
