"""The noise schedule of a base model, its prediction type, and DDIM.

`alpha` is the cumulative alpha_bar of the papers, in 0..1: `x = sqrt(alpha) clean + sqrt(1 - alpha) noise`. Schedule,
number of timesteps and prediction type are read from the base model's scheduler config.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from tuneavideo.errors import SettingsError
from tuneavideo.samplers import SAMPLERS


def add_noise(clean: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """Add noise to clean latents (DDPM, eq. 4); `alpha` has the shape of their first dimensions."""
    alpha = _broadcast(alpha, clean)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def target(clean: Tensor, noise: Tensor, alpha: Tensor, prediction_type: str) -> Tensor:
    """Return the training target: the noise, or the velocity (Progressive Distillation, appendix D)."""
    if prediction_type == "epsilon":
        return noise
    alpha = _broadcast(alpha, clean)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean


def split(x: Tensor, output: Tensor, alpha: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Return clean latents and noise implied by a model's `output` for `x` at `alpha` (a scalar tensor)."""
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction_type == "epsilon":
        return (x - spread * output) / signal, output
    return signal * x - spread * output, signal * output + spread * x


def ddim_move(clean: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """Combine clean latents and noise at `alpha` (DDIM, eq. 12, sigma = 0), for sampling or inversion."""
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule of a base model, read from its scheduler config.

    Attributes:
        alphas: alpha_bar of every training timestep, shape `(num_train_timesteps,)`, falling.
        final_alpha: alpha_bar of DDIM's clean latents (1, or that of timestep 0).
        prediction_type: `epsilon` or `v_prediction`.
        config: The scheduler config, from which samplers are made.
    """

    alphas: Tensor
    final_alpha: Tensor
    prediction_type: str
    config: dict[str, Any]

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSchedule:
        """Read the schedule of a diffusers scheduler.

        Raises:
            SettingsError: It has no betas, or predicts neither noise nor velocity.
        """
        # diffusers would drop what was passed by position and happens to be listed as a default
        config = {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
        kind = config.get("prediction_type", "epsilon")
        if kind not in ("epsilon", "v_prediction") or "beta_schedule" not in config:
            raise SettingsError(
                f"the base's scheduler is {type(scheduler).__name__} predicting {kind!r}; Tune-A-Video needs a model "
                "that predicts the noise ('epsilon') or the velocity ('v_prediction'): take a Stable Diffusion base"
            )
        ddim: Any = diffusers.DDIMScheduler.from_config(config)
        return cls(ddim.alphas_cumprod, ddim.final_alpha_cumprod, kind, config)

    def inversion_grid(self, steps: int, spacing: str | None) -> list[int]:
        """Return the rising timesteps of an inversion: those of DDIM sampling in `steps` steps, reversed."""
        return [int(t) for t in reversed(Sampler.of(self._scheduler("ddim", steps, spacing), steps).timesteps)]

    def sampler(self, name: str, steps: int, *, spacing: str | None = None, strength: float = 1.0) -> Sampler:
        """Return the sampler of a name (see `SAMPLERS`) for the last `strength` fraction of `steps` steps."""
        return Sampler.of(self._scheduler(name, steps, spacing), steps, strength)

    def _scheduler(self, name: str, steps: int, spacing: str | None) -> Any:
        count = len(self.alphas)
        if steps > count:
            raise SettingsError(f"{steps} steps requested; the model has {count} timesteps: take fewer steps")
        class_name, overrides = SAMPLERS[name]
        overrides = overrides | ({"timestep_spacing": spacing} if spacing else {})
        return getattr(diffusers, class_name).from_config(self.config, **overrides)


class Sampler:
    """A diffusers scheduler set to its steps, with the alpha_bar it starts from."""

    def __init__(self, scheduler: Any, skipped: int) -> None:
        self.scheduler = scheduler
        self.timesteps = self._without(skipped)
        self.start_alpha = self._alpha(skipped)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters

    @classmethod
    def of(cls, scheduler: Any, steps: int, strength: float = 1.0) -> Sampler:
        """Set any diffusers scheduler to the last `strength` fraction of `steps` steps."""
        scheduler.set_timesteps(steps)
        return cls(scheduler, (steps - max(1, round(steps * strength))) * getattr(scheduler, "order", 1))

    def clone(self) -> Sampler:
        """Return a copy at the same step with a state of its own."""
        clone, scheduler = copy.copy(self), copy.copy(self.scheduler)
        for name, value in vars(scheduler).items():
            if isinstance(value, list):
                setattr(scheduler, name, list(value))
        clone.scheduler = scheduler
        return clone

    def scale(self, x: Tensor, alpha: float) -> Tensor:
        """Scale latents at `alpha` for the scheduler: Euler and related ones do not scale the signal down."""
        unscaled = float(self.scheduler.init_noise_sigma) != 1.0
        return x / alpha**0.5 if unscaled else x

    def scale_input(self, x: Tensor, t: Tensor) -> Tensor:
        """Scale the model's input `x` for timestep `t`."""
        return self.scheduler.scale_model_input(x, t)

    def step(
        self, output: Tensor, t: Tensor, x: Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> Tensor:
        """Return the latents after one step."""
        extra = {"generator": generator} if self._takes_generator else {}
        return self.scheduler.step(output, t, x, return_dict=False, **extra)[0]

    def _without(self, skipped: int) -> Tensor:
        timesteps = self.scheduler.timesteps
        if skipped and isinstance(self.scheduler, diffusers.PNDMScheduler):
            # PLMS takes its second step twice, also when it starts later
            once = torch.cat([timesteps[:1], timesteps[2:]])[skipped:]
            return torch.cat([once[:2], once[1:]])
        return timesteps[skipped:]

    def _alpha(self, skipped: int) -> float:
        sigmas = getattr(self.scheduler, "sigmas", None)
        if sigmas is not None:
            return float(1 / (1 + sigmas[skipped] ** 2))
        return float(self.scheduler.alphas_cumprod[int(self.timesteps[0])])


def _broadcast(alpha: Tensor, like: Tensor) -> Tensor:
    return alpha.reshape(alpha.shape + (1,) * (like.ndim - alpha.ndim))
