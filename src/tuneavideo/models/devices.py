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
    """Return `no`, `fp16` or `bf16`: as requested, else bf16 on a device that computes in it, else `no`.

    With `low` memory a GPU without bf16 gets fp16. Raises SettingsError for fp16 without a GPU.
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
    """Return whether this CPU has instructions for bf16; without them bf16 is slower than float32."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def offload(pipe: Pipeline) -> None:
    """Keep VAE and text encoders in the host's memory except while they are called."""
    device = pipe._execution_device
    for part in (pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
        if part is not None:
            cpu_offload_with_hook(part, device)


def unload(part: Any) -> None:
    """Move a module that `offload` was called on back to the host's memory."""
    if isinstance(getattr(part, "_hf_hook", None), CpuOffload):
        part.to("cpu")


def used_memory(device: torch.device) -> int:
    """Return the peak of allocated bytes on a GPU, or the bytes that this process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def reset_peak_memory(device: torch.device) -> None:
    """Restart the peak that `used_memory` returns for a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Return free and total memory of a device in bytes."""
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else host_memory.free_and_total()


def available_memory(device: torch.device) -> int:
    """Return the bytes that a job on a GPU may take: free ones and those reserved by this process."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch, numpy or the system means that memory ran out."""
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
