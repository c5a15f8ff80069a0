"""The table of samplers. This module must not import torch: settings read it."""

from __future__ import annotations

from typing import Any

_PLAIN = {"use_karras_sigmas": False}

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    # name: (diffusers scheduler, changes to the base's scheduler config)
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **_PLAIN}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", _PLAIN),
    "deis": ("DEISMultistepScheduler", _PLAIN),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", _PLAIN),
    "heun": ("HeunDiscreteScheduler", {"clip_sample": False, **_PLAIN}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
}
OWN_TIMESTEPS = {"dpm++-karras", "plms", "heun"}
"""Samplers whose timesteps differ from those of a DDIM inversion with as many steps."""
STOCHASTIC_SAMPLERS = {"euler-ancestral"}
"""Samplers that add noise at every step."""
