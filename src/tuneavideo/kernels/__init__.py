"""Faster forms of attention, convolution and normalisation, by device; which Triton kernel suits a tensor on a GPU.

Triton is imported at the first question about a tensor on a GPU.
"""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

OLDEST = (8, 0)  # compute capability: Triton's products need bf16
MOST_FRAMES = 64  # of a clip in attention along time
FEW = 128  # keys, and channels of a head, that attention to a text takes
# Kernels of matrix products, which are slow to build and to run in full precision.
IN_HALVES = ("time", "shared", "text")
# Names of kernels that are left to torch, and whether tensors on a CPU are taken (by Triton's interpreter): for
# measurements and tests.
switched_off: set[str] = set()
interpreted = False


def suit(x: Tensor, name: str) -> bool:
    """Whether the kernel `name` takes such a tensor here."""
    if not (x.device.type == "cuda" or interpreted) or name in switched_off or torch.compiler.is_compiling():
        return False
    exact = (torch.float32,) if interpreted or name not in IN_HALVES else ()
    return x.dtype in (torch.float16, torch.bfloat16, *exact) and usable(x.device)


@cache
def usable(device: torch.device) -> bool:
    """Whether Triton is there and builds and runs a kernel on this device; a warning says why it does not."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST:
        return False
    try:
        from tuneavideo.kernels import pointwise

        x = torch.ones(2, 16, device=device)
        return bool((pointwise.added(x, x) == 2).all())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("Triton builds no kernels here (%s); torch's own are used, which are slower", reason)
        return False


@cache
def frames_index(device: torch.device, *frames: int) -> Tensor:
    """Numbers of frames, on a device."""
    return torch.tensor(frames, dtype=torch.int32, device=device)


def module(name: str) -> ModuleType:
    """A module of this package; only for a tensor that its kernels suit."""
    from importlib import import_module

    return import_module(f"tuneavideo.kernels.{name}")
