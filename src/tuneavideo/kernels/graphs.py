"""CUDA graphs: GPU work that is recorded once and replayed.

The CPU then launches one graph instead of some thousand kernels, which takes it longer than the GPU needs to run them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
enabled = True  # False in measurements and tests

# Steps before one is recorded: kernels are built and the memory of a step is measured in them.
STEPS_BEFORE = 2


class Recording:
    """A function of tensors, recorded with `inputs`; calls take others of the same shapes.

    Nothing is computed while it is recorded. The result of a call is overwritten by the next call.
    """

    def __init__(self, run: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Any = None) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.output = run(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output


def supports(device: torch.device) -> bool:
    """Return whether work on a device can be recorded."""
    return enabled and device.type == "cuda"


def new_pool() -> Any:
    """Return a memory pool that several recordings share."""
    return torch.cuda.graph_pool_handle()


def record(run: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Any = None) -> Recording | None:
    """Return a recording of `run`, or log a warning and return None."""
    try:
        return Recording(run, inputs, pool)
    except Exception as error:  # whatever it is, the work can be done unrecorded
        logger.warning("GPU work is launched kernel by kernel, as recording failed: %s", str(error).splitlines()[0])
        return None


class StepRecorder:
    """A tuning step that is recorded on a GPU, after a few steps and if memory holds a second set of activations.

    Args:
        run: Computes the loss of a step from tensors and accumulates gradients.
        parameters: The trained parameters.
        device: Where they are.
        allowed: False where a step cannot be recorded.
    """

    def __init__(self, run: Callable[..., Tensor], parameters: Any, device: torch.device, *, allowed: bool) -> None:
        self.run, self.parameters, self.device = run, list(parameters), device
        self.pending = allowed and supports(device)
        self.recording: Recording | None = None
        self.gradients: list[Tensor | None] = []
        self.steps = self.peak = 0

    def __call__(self, *inputs: Tensor) -> Tensor | None:
        """Replay a step; returns its loss, or None if there is no recording: then the caller computes the step."""
        if self.pending and self.steps >= STEPS_BEFORE and self._fits():
            self.pending = False
            self.recording = record(self.run, inputs)
            self.gradients = [parameter.grad for parameter in self.parameters]
            if not self.recording:
                for parameter in self.parameters:
                    parameter.grad = None
        if not self.recording:
            return None
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.recording(*inputs)

    def finish_step(self) -> None:
        """Count a step and note the memory it needed."""
        self.steps += 1
        if self.pending:
            self.peak = torch.cuda.max_memory_allocated(self.device)

    def release(self) -> None:
        """Free the memory of the recording."""
        self.recording, self.gradients = None, []

    def _fits(self) -> bool:
        held = torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device) - held
        return free > 2 * (self.peak - held)
