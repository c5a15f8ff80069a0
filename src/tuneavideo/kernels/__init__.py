"""Attention, normalisation and memory layout by device: Triton kernels on NVIDIA GPUs, torch's operations elsewhere.

Below `models` only this package depends on the device of a tensor. Modules of Triton kernels (`along_time`, `few_keys`,
`group_norm`, `pointwise`, `shared_map`) are imported where a tensor on a GPU needs them, since Triton may be missing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_traces_meta = False
MIN_CAPABILITY = (8, 0)  # compute capability: Triton's matrix products need bf16


def supports(x: Tensor, *, half_only: bool = False) -> bool:
    """Return whether Triton kernels take a tensor; matrix products (`half_only`) are slow in float32."""
    dtypes = (torch.float16, torch.bfloat16) if half_only else (torch.float16, torch.bfloat16, torch.float32)
    if x.dtype not in dtypes or torch.compiler.is_compiling():
        return False
    return works_on(x.device) if x.device.type == "cuda" else x.is_meta and _traces_meta


@contextmanager
def traced_on_meta() -> Iterator[None]:
    """Let kernels take tensors of the meta device, without launching anything; needs Triton."""
    global _traces_meta
    from triton.runtime.jit import KernelInterface  # pyright: ignore[reportMissingImports]

    with patch.object(KernelInterface, "__getitem__", lambda *_: lambda *_, **__: None):
        _traces_meta = True
        try:
            yield
        finally:
            _traces_meta = False


@cache
def works_on(device: torch.device) -> bool:
    """Build and run a kernel on a GPU; if that fails, log a warning and return False."""
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    try:
        from tuneavideo.kernels import pointwise

        x = torch.ones(2, 16, device=device)
        return bool((pointwise.add(x, x) == 2).all())
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("Triton cannot build kernels (%s); torch's operations are used, which are slower", reason)
        return False


def is_asynchronous(device: torch.device) -> bool:
    """Return whether the CPU is free while the device computes."""
    return device.type == "cuda"
