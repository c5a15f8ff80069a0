"""Counts of the operations around Triton kernels, in a UNet that Triton's interpreter computes on a CPU.

TRITON_INTERPRET=1 python -m tests.kernel_counts
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from benchmarks.parity.golden import levels
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from tests.conftest import TINY
from tests.kernel_cases import error
from tuneavideo import kernels
from tuneavideo.kernels import channels_last
from tuneavideo.method import attention
from tuneavideo.method.inflate import VideoUNet, inflate
from tuneavideo.method.tuning import Tuning
from tuneavideo.settings import TuneSettings
from tuneavideo.training.optimizers import make_optimizer

SUPPORTS = (kernels.attention, kernels.channels_last, attention)
COPIES = ("aten::clone", "aten::copy_", "aten::_to_copy")


class Counted(TorchDispatchMode):
    """Counts of the operations of torch within a context.

    Attributes:
        layouts: Copies of tensors of three dimensions and more in another order, by shape.
        casts: Casts of tensors that have no trained parameter's shape, by shape.
        weights: Casts of tensors with the shape of a trained parameter: its value and its gradient.
        counts: Launched kernels, and transfers of values to the host.
    """

    def __init__(self, parameters: Any = ()) -> None:
        super().__init__()
        self.shapes = {tuple(parameter.shape) for parameter in parameters}
        self.layouts, self.casts = Counter[str](), Counter[str]()
        self.weights, self.counts = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), func._schema.name
        if name == "aten::_local_scalar_dense":
            self.counts["transfers"] += 1
        if name in COPIES:
            given = args[1] if name == "aten::copy_" else args[0]
            if given.dtype != result.dtype:
                if tuple(given.shape) in self.shapes:
                    self.weights += 1
                else:
                    self.casts[f"{given.dtype} to {result.dtype} {list(given.shape)}"] += 1
            elif given.ndim > 2 and is_reordered(given, result):
                self.layouts[f"{name} {list(given.shape)} {given.stride()} to {result.stride()}"] += 1
        return result


def is_reordered(x: Tensor, y: Tensor) -> bool:
    """Return whether the dimensions of `y` lie in memory in another order than those of `x`."""
    kept = [dim for dim in range(x.ndim) if x.shape[dim] > 1 and x.stride(dim)]  # not those that are repeated
    return sorted(kept, key=lambda dim: -x.stride(dim)) != sorted(kept, key=lambda dim: -y.stride(dim))


def interpreted(counted: Counted, launch: Any) -> Any:
    """Return a launch of a kernel that is counted, but not what the interpreter does in it."""

    def run(*args: Any, **more: Any) -> Any:
        counted.counts["kernels"] += 1
        with _disable_current_modes():
            return launch(*args, **more)

    return run


def unet() -> VideoUNet:
    """Return an inflated UNet with the layers of `channels_last`."""
    torch.manual_seed(0)
    video = inflate(UNet2DConditionModel(**TINY).requires_grad_(False))
    for name, parameter in video.unet.named_parameters():
        if "attn_temp" in name:
            torch.nn.init.uniform_(parameter, -0.1, 0.1)
    channels_last.replace_layers(video.unet)
    return video


def call(injects: bool) -> dict[str, Any]:
    """Count in a guided call, and compare it with torch's operations."""
    clips = 3 if injects else 2
    video = unet()
    video.clip.inject = injects
    inputs = torch.randn(clips, 4, 3, 4, 6), torch.tensor(500), torch.randn(clips, 9, 24)
    with torch.no_grad():
        counted = Counted()
        launch = interpreter.GridExecutor.__call__
        with patch.object(interpreter.GridExecutor, "__call__", interpreted(counted, launch)), counted:
            found = video(*inputs)
        with patched(lambda *_, **__: False):
            expected = video(*inputs)
    return {"layouts": counted.layouts, "casts": counted.casts, **counted.counts, "error": error(found, expected)}


def step() -> dict[str, Any]:
    """Count in the second of three tuning steps, in bf16."""
    video = unet()
    video.unet.bfloat16()
    settings = TuneSettings(video="-", prompt="-", max_train_steps=3, gradient_checkpointing=False)
    moments = {"mean": torch.randn(1, 4, 3, 4, 6), "std": torch.ones(1, 4, 3, 4, 6)}
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    text = torch.randn(1, 9, 24)
    tuning = Tuning(video, levels(), moments, text, settings, accelerator, make_optimizer)
    steps = iter(tuning)
    next(steps)
    counted = Counted(tuning.parameters.values())
    launch, tolist = interpreter.GridExecutor.__call__, Tensor.tolist

    def transferred(x: Tensor) -> Any:
        counted.counts["transfers"] += 1
        return tolist(x)

    with (
        patch.object(interpreter.GridExecutor, "__call__", interpreted(counted, launch)),
        patch.object(Tensor, "tolist", transferred),
        counted,
    ):
        next(steps)
    return {"layouts": counted.layouts, "casts": counted.casts, "weights": counted.weights, **counted.counts,
            "trained": len(tuning.parameters)}  # fmt: skip


def patched(supports: Any) -> ExitStack:
    """Return a context in which all layers ask `supports` whether kernels take a tensor."""
    stack = ExitStack()
    for module in SUPPORTS:
        stack.enter_context(patch.object(module, "supports", supports))
    return stack


if __name__ == "__main__":
    with patched(lambda *_, **__: True):
        print(json.dumps({"guided": call(False), "injected": call(True), "step": step()}))
