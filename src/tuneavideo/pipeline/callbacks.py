"""Callbacks at the end of denoising steps, as in diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from tuneavideo.method.sampling import EditStep

TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class StepCallback:
    """A callback and the names of the tensors that it is called with."""

    function: Callback | None
    tensors: Sequence[str]

    @classmethod
    def of(cls, function: Callback | None, tensors: Sequence[str]) -> Self:
        """Return the callback; diffusers' own callbacks name their tensors. Raises ValueError for an unknown name."""
        if isinstance(function, PipelineCallback | MultiPipelineCallbacks):
            tensors = function.tensor_inputs
        if unknown := {*tensors} - {*TENSORS}:
            raise ValueError(f"callback_on_step_end_tensor_inputs has to be in {TENSORS}, found {unknown}")
        return cls(function, tensors)

    def __call__(self, pipe: Any, index: int, timestep: Tensor, step: EditStep) -> None:
        """Call the function after a step, and replace tensors of the step by those that it returns."""
        if self.function is None:
            return
        given = self._inputs(step)
        changed = self.function(pipe, index, timestep, dict(given)) or {}
        _replace(step, given, changed)
        step.guidance_scale, step.stop = pipe.guidance_scale, pipe.interrupt

    def _inputs(self, step: EditStep) -> dict[str, Tensor]:
        text, negative = step.text.text_BLD, step.negative.text_BLD
        both = torch.cat([negative, text]) if step.guidance_scale > 1 else text
        tensors = {"latents": step.latents, "prompt_embeds": both, "negative_prompt_embeds": negative}
        return {name: tensors[name] for name in self.tensors}


def _replace(step: EditStep, given: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> None:
    """Replace the tensors of a step by those that a callback returned."""
    step.latents = changed.get("latents", step.latents)
    texts = changed.get("prompt_embeds", step.text.text_BLD)
    if len(texts) == 2 * len(step.latents):
        negative, texts = texts.chunk(2)
        step.negative = replace(step.negative, text_BLD=negative)
    step.text = replace(step.text, text_BLD=texts)
    negative = changed.get("negative_prompt_embeds")
    if negative is not None and negative is not given.get("negative_prompt_embeds"):
        step.negative = replace(step.negative, text_BLD=negative)
